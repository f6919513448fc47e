"""A real Ray head with the job server and token authentication, and a way to run the jobs' entry points."""

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RAY = Path(sys.executable).with_name("ray")

RunJob = Callable[..., "subprocess.CompletedProcess[str]"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass(frozen=True)
class Head:
    """A running Ray head node."""

    address: str
    dashboard: str
    environment: dict[str, str]


@pytest.fixture(scope="session")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """``ray start --head`` in its own process group, stopped at the end; nothing else on the machine is touched."""
    port, dashboard = free_port(), free_port()
    environment = os.environ | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    log = tmp_path_factory.mktemp("head") / "head.log"
    command = [
        str(RAY), "start", "--head", "--block", "--num-cpus=4", "--node-ip-address=127.0.0.1",
        f"--port={port}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
        "--object-store-memory=1000000000",
        # A fixed port by default, which another Ray on this machine may hold; without it no job can start.
        f"--dashboard-agent-listen-port={free_port()}",
    ]  # fmt: skip
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    found = Head(f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}", environment)
    try:
        _wait_for_agent(found, process, log)
        yield found
    finally:
        process.terminate()
        try:
            process.wait(timeout=60)  # a head drains for up to 30 s
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass


def _wait_for_agent(head: Head, process: "subprocess.Popen[bytes]", log: Path) -> None:
    # The job server answers some twenty seconds before the agent that starts jobs is there.
    command = [str(RAY), "job", "submit", "--address", head.dashboard, "--", "true"]
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        tried = subprocess.run(command, env=head.environment, capture_output=True, text=True)
        if tried.returncode == 0:
            return
        time.sleep(3)
    pytest.fail(f"no job could be submitted within 240 s: {tried.stdout}{tried.stderr}")


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
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
