"""A real Ray head node with the job server and token authentication, as its users start one."""

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RAY = Path(sys.executable).with_name("ray")


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
    pid: int


@contextmanager
def ray_head(
    folder: Path, variables: dict[str, str] | None = None, *, jobs: bool = True
) -> Iterator[Head]:
    """``ray start --head`` in its own process group, stopped at the end; nothing else on the machine is touched.

    Args:
        folder: receives ``head.log``.
        variables: more of the environment, which every process of the cluster inherits.
        jobs: wait until jobs can be submitted, which takes longest.
    """
    port, dashboard = free_port(), free_port()
    environment = os.environ | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        **(variables or {}),
    }
    log = folder / "head.log"
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
    found = Head(f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}", environment, process.pid)
    try:
        _wait_for(found, process, log, _submit if jobs else _health)
        yield found
    finally:
        try:
            if jobs:
                process.terminate()
                process.wait(timeout=60)  # a head drains for up to 30 s
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()


def _submit(head: Head) -> list[str]:
    # The job server answers some twenty seconds before the agent that starts jobs is there.
    return [str(RAY), "job", "submit", "--address", head.dashboard, "--", "true"]


def _health(head: Head) -> list[str]:
    return [str(RAY.with_name("serve")), "status", "-a", head.dashboard]


def _wait_for(
    head: Head,
    process: "subprocess.Popen[bytes]",
    log: Path,
    command: Callable[[Head], list[str]],
) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        tried = subprocess.run(command(head), env=head.environment, capture_output=True, text=True)
        if tried.returncode == 0:
            return
        time.sleep(3)
    pytest.fail(f"the head is not usable within 240 s: {tried.stdout}{tried.stderr}")
