"""A running service to test against, and what tests do to it."""

import os
import re
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx


@dataclass(frozen=True)
class Service:
    """Where it listens, and the process that its Ray descends from."""

    url: str
    root: int

    def caption(self, picture: bytes, **parameters: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/captions", params=parameters, content=picture, timeout=60)

    def replicas(self, deployment: str) -> list[int]:
        """Process ids of a deployment's replicas."""
        name = f"ray::ServeReplica:captioner:{deployment}"
        return [pid for pid, command in self.processes() if re.match(rf"{name}\b", command)]

    def proxies(self) -> list[int]:
        """Process ids of Ray Serve's HTTP proxies."""
        return [pid for pid, command in self.processes() if "ProxyActor" in command]

    def kill(self, deployment: str) -> int:
        """SIGKILL to one of them."""
        pid = self.replicas(deployment)[0]
        os.kill(pid, signal.SIGKILL)
        return pid

    def processes(self) -> list[tuple[int, str]]:
        """All processes of its Ray, with their command lines; nothing else on the machine is looked at."""
        children: dict[int, list[int]] = {}
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit() and (stat := _read(folder / "stat")):
                parent = int(stat.rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(folder.name))
        found, seen = [], [self.root]
        while seen:
            pid = seen.pop()
            seen += children.get(pid, [])
            found.append((pid, _read(Path(f"/proc/{pid}/cmdline")).replace("\0", " ")))
        return found

    def wait_until_ready(self, process: "subprocess.Popen[bytes] | None" = None) -> None:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            assert process is None or process.poll() is None, "the service ended"
            try:
                if httpx.get(f"{self.url}/healthz", timeout=10).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.5)
        raise TimeoutError(f"{self.url} is not ready within 300 s")


def _read(file: Path) -> str:
    try:
        return file.read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""  # it ended meanwhile
