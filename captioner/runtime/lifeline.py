"""Notices that the Ray a driver hangs on has died, and ends the driver with one line.

Left alone, a driver whose raylet dies is ended by Ray at once, with the raylet's last words on the screen; one whose
head dies waits for a minute; and one whose raylet dies while it starts waits for as long as a start may take.
"""

import atexit
import contextlib
import os
import select
import socket
import threading
import time
from pathlib import Path

import ray

from captioner.errors import OutOfReachError
from captioner.runtime.screen import SCREEN

_PROC = Path("/proc")
_EVERY = 1.0
# The head is gone when it has not answered for so long; a busy one answers late.
_HEAD_EVERY, _HEAD_SECONDS = 5.0, 25.0


class Lifeline:
    """Watches, on a thread of its own and until the interpreter ends, the raylet and the head of a driver's Ray."""

    def __init__(self, node_id: str | None = None):
        """
        Args:
            node_id: the driver's node; None: that of a Ray which this process is about to start.
        """
        self._node_id = node_id
        self._over = threading.Event()
        self._joined = threading.Event()
        # Ray's own handler, registered before, runs after this one.
        atexit.register(self._over.set)
        threading.Thread(target=self._watch, daemon=True).start()

    def joined(self) -> None:
        """The driver has its Ray: from now on it may also be the one that ends it."""
        self._joined.set()

    def _watch(self) -> None:
        raylet = self._wait_for_raylet()
        head: tuple[str, int] | None = None
        answered, asked = time.monotonic(), 0.0
        with contextlib.closing(_Ending(raylet)) as ending:
            while not self._over.is_set():
                gone = ending.wait(_EVERY)
                if self._joined.is_set() and not ray.is_initialized():
                    return  # ray.shutdown() lets go before it ends what it started
                if gone:
                    self._end("its raylet on this machine has ended")
                if head is None and ray.is_initialized():
                    host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
                    head, answered = (host, int(port)), time.monotonic()
                if head is None or time.monotonic() - asked < _HEAD_EVERY:
                    continue
                asked = time.monotonic()
                if _answers(head):
                    answered = time.monotonic()
                elif time.monotonic() - answered > _HEAD_SECONDS:
                    self._end(f"its head at {head[0]}:{head[1]} is gone")

    def _wait_for_raylet(self) -> int:
        while not self._over.wait(0 if self._node_id else _EVERY / 4):
            if pid := _find_raylet(self._node_id):
                return pid
            if self._node_id:
                break
        return 0

    def _end(self, what: str) -> None:
        if self._over.is_set():
            return
        log = f" (its log: {SCREEN.log})" if SCREEN.log else ""
        SCREEN.say_at_last(f"error: Ray has died: {what}; the same command goes on from here{log}")
        # What else the process has to say is about the same, and handlers would wait for a Ray that is not there.
        os._exit(OutOfReachError.status)


class _Ending:
    """Waits for the end of a process that need not be a child."""

    def __init__(self, pid: int):
        self._poll = select.poll()
        self._file = -1
        with contextlib.suppress(OSError):
            self._file = os.pidfd_open(pid)
            self._poll.register(self._file, select.POLLIN)

    def wait(self, seconds: float) -> bool:
        if self._file < 0:
            time.sleep(seconds)
        return self._file >= 0 and bool(self._poll.poll(1000 * seconds))

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)


def _find_raylet(node_id: str | None) -> int:
    """The process of a node's raylet, or of one that is a child of this process; 0 where there is none."""
    for folder in _PROC.glob("[0-9]*"):
        with contextlib.suppress(OSError):
            name, *arguments = (folder / "cmdline").read_bytes().split(b"\0")
            if not name.endswith(b"/raylet"):
                continue
            if node_id:
                ours = f"--node_id={node_id}".encode() in arguments
            else:
                # Behind the name, in brackets: the state, then the parent.
                status = (folder / "stat").read_text().rpartition(")")[2].split()
                ours = int(status[1]) == os.getpid()
            if ours:
                return int(folder.name)
    return 0


def _answers(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, timeout=_HEAD_EVERY).close()
    except OSError:
        return False
    return True
