"""A real Ray head node with the job server and token authentication, as its users start one."""

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
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
    folder: Path,
    variables: dict[str, str] | None = None,
    *,
    jobs: bool = True,
    cpus: int = 4,
    gpus: int = 0,
) -> Iterator[Head]:
    """``ray start --head`` in its own process group, stopped at the end; nothing else on the machine is touched.

    Args:
        folder: receives ``head.log``.
        variables: more of the environment, which every process of the cluster inherits.
        cpus, gpus: logical ones.
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
        str(RAY), "start", "--head", "--block", f"--num-cpus={cpus}",
        f"--num-gpus={gpus}", "--node-ip-address=127.0.0.1",
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
        _wait_for(process, log, found, jobs)
        yield found
    finally:
        # Asked to end, a head would drain for up to 30 s. Its processes die with it.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_for(process: "subprocess.Popen[bytes]", log: Path, head: Head, jobs: bool) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        if _is_ready(head, jobs):
            return
        time.sleep(0.5)
    pytest.fail("the head is not usable within 240 s")


def _is_ready(head: Head, jobs: bool) -> bool:
    with httpx.Client(
        base_url=head.dashboard,
        headers={"Authorization": f"Bearer {head.environment['RAY_AUTH_TOKEN']}"},
        timeout=60,
    ) as client:
        try:
            if jobs:
                # The job server answers some twenty seconds before the agent that starts jobs is there.
                answer = client.post("/api/jobs/", json={"entrypoint": "true"})
            else:
                answer = client.get("/api/serve/applications/")
        except httpx.TransportError:
            return False
    return answer.status_code == 200
