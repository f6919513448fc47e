"""A fence around the loading of pictures: whatever one does to the process that loads it, the others are loaded.

Pictures are loaded in child processes, which take them from shared memory and leave there what they made of them. An
exception, too much memory or too much time is an ``ImageError`` of that picture. So is the end of the process, once the
picture has ended a second one that it had to itself: somebody else may have killed the first.
"""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Pipe
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np

from captioner.config import ImageLimits
from captioner.errors import ImageError, OutOfReachError
from captioner.images.fenced import ERRORS, PATIENCE, ROUND_BYTES, Found, Region

# Processes that a picture may end before it is given up: those that somebody else ended (the kernel, when memory runs
# out on the machine) say little about it.
_TRIES, _TRIES_WHEN_KILLED = 2, 3
_TRIES_TO_START = 10
_START_SECONDS = 120.0

_ENVIRONMENT = {
    # A thread for each core has its own stack and buffers, and a picture needs none.
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    # Memory of one picture is kept for the next: returned to the system and had anew it costs a tenth of the rate.
    "MALLOC_MMAP_THRESHOLD_": str(2**25),
    "MALLOC_TRIM_THRESHOLD_": str(2**26),
}


def memory_limit(limits: ImageLimits) -> int:
    """Bytes of address space that suffice for loading any one picture within the limits."""
    # That of memory is estimated from the header, and what is addressed is more than what is used.
    return 3 * limits.max_load_bytes // 2 + 4 * limits.max_bytes + 2**28


class Fence:
    """Loads pictures in child processes, as many as there are threads that ask at the same time.

    They start when they are needed, stay for the next pictures, and end with this object or with their parent.
    """

    def __init__(
        self,
        load: Callable[[bytes], Any] | bytes,
        *,
        memory: int = memory_limit(ImageLimits()),  # noqa: B008 a number
        seconds: float = 60.0,
    ):
        """
        Args:
            load: a function, which is pickled, or one that is pickled already. Of the bytes of a picture it makes a
                dictionary or a dataclass of arrays, bytes and what JSON can say, or raises ImageError.
            memory: bytes that loading one picture may take.
            seconds: of a processor that it may take, and ten times as long in all: machines may be busy.
        """
        self._pickled = load if isinstance(load, bytes) else bytes(ForkingPickler.dumps(load))
        self._memory, self._seconds = memory, seconds
        self._idle: list[_Child] = []

    def load(self, pictures: Sequence[Any]) -> list[Found | ImageError]:
        """What the loader makes of each encoded picture (bytes, or a buffer of them), or why there is nothing.

        Raises:
            RuntimeError: the child processes do not start: the loader cannot be unpickled or imported there.
            OutOfReachError: the machine has no room for them, or somebody kills them as they start.
        """
        found: list[Found | ImageError] = []
        deaths = 0
        while len(found) < len(pictures):
            start = len(found)
            stop = start + 1 if deaths else _round(pictures, start)
            child = self._take()
            try:
                for one in child.load(pictures[start:stop]):
                    found.append(one)
                    deaths = 0
            except _DeathError as death:
                child.close()
                deaths += 1
                if deaths >= death.tries:
                    found.append(ImageError(str(death)))
                    deaths = 0
                elif deaths > 1:
                    time.sleep(1.0)  # for the machine's memory to come free
            except BaseException:
                child.close()
                raise
            else:
                self._idle.append(child)
        return found

    def close(self) -> None:
        """End the child processes that have nothing to do."""
        while self._idle:
            self._idle.pop().close()

    def _take(self) -> "_Child":
        with contextlib.suppress(IndexError):
            return self._idle.pop()
        for _ in range(_TRIES_TO_START):
            try:
                return _Child(self._pickled, self._memory, self._seconds)
            except _DeathError as death:
                # An exception says the same each time; a process that is killed was in somebody's way.
                if death.tries != _TRIES_WHEN_KILLED:
                    raise RuntimeError(f"no process for loading pictures starts: {death}") from None
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.ENOMEM):
                    raise
            time.sleep(1.0)
        raise OutOfReachError("no process for loading pictures starts: is memory short?")


def _round(pictures: Sequence[Any], start: int) -> int:
    """The end of those that are handed over together."""
    size, stop = len(pictures[start]), start + 1
    while stop < len(pictures) and size + len(pictures[stop]) <= ROUND_BYTES:
        size += len(pictures[stop])
        stop += 1
    return stop


class _DeathError(Exception):
    """A child process is gone; the message says what the picture did."""

    def __init__(self, message: str, tries: int = _TRIES):
        super().__init__(message)
        self.tries = tries


class _Child:
    """A child process, seen by its parent.

    Raises:
        _DeathError: it does not start.
    """

    def __init__(self, pickled: bytes, memory: int, seconds: float):
        self._memory, self._seconds = memory, seconds
        shared = os.memfd_create("pictures")
        self._region = Region(shared)
        self._connection, theirs = Pipe()
        program = (
            f"import sys; sys.path[:] = {sys.path!r}; "
            f"from captioner.images.fenced import serve; serve({theirs.fileno()}, {shared})"
        )
        with tempfile.TemporaryFile() as said, theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", program],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=said,
                pass_fds=(theirs.fileno(), shared),
                # Ctrl-C is for the parent, whose end is ours.
                start_new_session=True,
                env=os.environ | _ENVIRONMENT,
            )
            theirs.close()
            os.close(shared)
            try:
                self._connection.send_bytes(pickled)
                self._connection.send((memory, seconds))
                if not self._connection.poll(_START_SECONDS):
                    self._process.kill()
                self._connection.recv_bytes()
            except (EOFError, OSError):
                death = self._death()
                self.close()
                said.seek(0)
                lines = said.read().decode(errors="replace").strip().splitlines()
                raise _DeathError(lines[-1] if lines else str(death), death.tries) from None

    def load(self, pictures: Sequence[Any]) -> Iterator[Found | ImageError]:
        """What becomes of each picture, in their order.

        Raises:
            _DeathError: while loading the next one.
        """
        end = 0
        for picture in pictures:
            self._region.write(end, picture)
            end += len(picture)
        try:
            self._connection.send_bytes(json.dumps([len(one) for one in pictures]).encode())
            for _ in pictures:
                said = json.loads(self._connection.recv_bytes())
                if "found" in said:
                    yield {name: self._take(value) for name, value in said["found"].items()}
                elif said["type"] == "MemoryError":
                    raise _DeathError(
                        f"loading it takes more than {self._memory >> 20} MiB of memory"
                    )
                else:
                    yield ERRORS[said["type"]](said["error"])
        except (EOFError, OSError):
            raise self._death() from None

    def close(self) -> None:
        self._connection.close()
        self._process.kill()
        self._process.wait()
        self._region.close()

    def _take(self, said: Found) -> Any:
        if "value" in said:
            return said["value"]
        data = self._region.read(said["start"], said["bytes"])
        if "dtype" not in said:
            return data
        return np.frombuffer(data, said["dtype"]).reshape(said["shape"])

    def _death(self) -> _DeathError:
        status = self._process.wait()
        if status == -signal.SIGPROF:
            return _DeathError(f"not loaded after {self._seconds:g} s of processor time")
        if status == -signal.SIGALRM:
            return _DeathError(f"not loaded after {PATIENCE * self._seconds:g} s")
        if status >= 0:
            return _DeathError(f"loading it ends the process (status {status})")
        how = signal.Signals(-status).name
        tries = _TRIES_WHEN_KILLED if status == -signal.SIGKILL else _TRIES
        return _DeathError(f"loading it ends the process ({how})", tries)
