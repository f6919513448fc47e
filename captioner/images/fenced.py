"""The process that a fence is around: it loads pictures until its parent, ``fence.py``, is gone."""

import contextlib
import json
import mmap
import os
import resource
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from captioner.errors import ImageError, ImageTooLargeError, ImageTypeError

Found = dict[str, Any]
"""What a loader makes of a picture: arrays, bytes, and what JSON can say."""

# Encoded bytes handed over at a time, but one picture at least.
ROUND_BYTES = 2**25
# A picture may take so many times longer than it may keep a processor busy.
PATIENCE = 10
ERRORS = {kind.__name__: kind for kind in (ImageError, ImageTypeError, ImageTooLargeError)}


class Region:
    """Memory that two processes share, and that grows as either needs."""

    def __init__(self, file: int):
        os.ftruncate(file, max(os.fstat(file).st_size, mmap.PAGESIZE))
        self._map = mmap.mmap(file, 0)

    def write(self, start: int, data: Any) -> None:
        if (end := start + len(data)) > len(self._map):
            # The other process may have made it larger.
            self._map.resize(max(2 * end, self._map.size()))
        self._map[start:end] = data

    def read(self, start: int, size: int) -> bytes:
        if start + size > len(self._map):
            self._map.resize(self._map.size())
        return self._map[start : start + size]

    def close(self) -> None:
        self._map.close()


@dataclass
class _Shelf:
    """Where the child process puts what it made, behind the pictures that it was given."""

    region: Region
    end: int

    def put(self, value: Any) -> Found:
        """What JSON can say of a value."""
        if isinstance(value, np.ndarray):
            data = np.ascontiguousarray(value)
            place = self._keep(data.reshape(-1).view(np.uint8).data)
            return place | {"dtype": value.dtype.str, "shape": value.shape}
        return self._keep(value) if isinstance(value, bytes) else {"value": value}

    def _keep(self, data: Any) -> Found:
        start = self.end
        self.region.write(start, data)
        self.end += len(data)
        return {"start": start, "bytes": len(data)}


def serve(connection_file: int, memory_file: int) -> None:
    """The life of a child process. It ends when its parent does, if need be by the alarm of its last picture."""
    connection, region = Connection(connection_file), Region(memory_file)
    load = connection.recv()
    memory, seconds = connection.recv()
    _limit_memory(memory)
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # libtiff and others talk
    # By default they end a process even where native code never returns.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    with contextlib.suppress(EOFError, OSError):
        connection.send_bytes(b"ready")
        while True:
            lengths = json.loads(connection.recv_bytes())
            start, shelf = 0, _Shelf(region, sum(lengths))
            for length in lengths:
                _set_alarms(seconds)
                said = _load_one(load, region.read(start, length), shelf)
                _set_alarms(0)
                connection.send_bytes(json.dumps(said).encode())
                if said.get("type") == "MemoryError":
                    return  # a new process says whether it was this picture's doing
                start += length


def _load_one(load: Callable[[bytes], Any], data: bytes, shelf: _Shelf) -> Found:
    try:
        found = load(data)
        fields = found if isinstance(found, dict) else vars(found)
        return {"found": {name: shelf.put(value) for name, value in fields.items()}}
    except MemoryError:
        return {"type": "MemoryError"}
    except ImageError as error:
        kind = type(error).__name__
        return {"type": kind if kind in ERRORS else "ImageError", "error": _plain(str(error))}
    except BaseException as error:  # the fence
        text = " ".join(f"cannot be loaded: {type(error).__name__}: {error}".split())
        return {"type": "ImageError", "error": _plain(text)[:300].removesuffix(":")}


def _plain(text: str) -> str:
    """As a table takes it: what a loader quotes of a file may be no text."""
    return text.encode(errors="backslashreplace").decode()


def _set_alarms(seconds: float) -> None:
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE * seconds)


def _limit_memory(memory: int) -> None:
    """Let this process take so many bytes beyond what it has, which then is MemoryError or its own end."""
    with open("/proc/self/statm", encoding="ascii") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    limit = now + memory + 4 * ROUND_BYTES
    limit = limit if most == resource.RLIM_INFINITY else min(limit, most)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
