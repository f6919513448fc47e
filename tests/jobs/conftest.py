"""A real Ray head with the job server and token authentication, and a way to run the jobs' entry points."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from tests.head import RAY, ROOT, Head, ray_head

RunJob = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="package")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    # On a cluster `python` is that of its environment.
    path = {"PATH": f"{RAY.parent}{os.pathsep}{os.environ['PATH']}"}
    with ray_head(tmp_path_factory.mktemp("head"), path) as found:
        yield found


@pytest.fixture(scope="package")
def run_job(head: Head) -> RunJob:
    """Run ``python -m ray_jobs.NAME`` in a child process on the head's cluster."""

    def run(name: str, *arguments: str, timeout: float = 600) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", f"ray_jobs.{name}", *arguments],
            env=head.environment | {"RAY_ADDRESS": head.address},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


@pytest.fixture(scope="package")
def submit_job(head: Head) -> RunJob:
    """The same through ``ray job submit --working-dir .``."""

    def submit(
        name: str, *arguments: str, timeout: float = 600
    ) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [
                str(RAY),
                "job",
                "submit",
                "--address",
                head.dashboard,
                "--working-dir",
                ".",
                "--",
                sys.executable,
                "-m",
                f"ray_jobs.{name}",
                *arguments,
            ],  # fmt: skip
            env=head.environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return submit
