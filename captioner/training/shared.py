"""Large arrays once a node: whichever process wants one first fills it, the others map the same pages.

An array is a file without a name, in memory or on the disk, so nothing is left behind, however its processes end. They
find it by the kernel's list of what each of them has open.
"""

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np

Array = np.ndarray[Any, Any]

_PROC = "/proc"


def shared_array(
    name: str,
    shape: tuple[int, ...],
    dtype: Any,
    fill: Callable[[Array], None],
    *,
    on_disk: bool,
) -> Array:
    """An array [*shape] that all processes of this user on this node share; nobody may write to it.

    Args:
        name: says what is in it, the same for the same content only.
        fill: writes the content, in one of the processes; in another one if that one is killed or raises meanwhile.
        on_disk: where it is made: in a file in the temporary directory, or in memory.

    Raises:
        OSError: there is no room for it; and whatever ``fill`` raises.
    """
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    with _alone(tempfile.gettempdir()):
        # Whoever finds none makes it before the next one looks.
        file = _find(f"captioner-{name}.") or _create(f"captioner-{name}.", size + 1, on_disk)
    with file:
        array: Array = np.memmap(file, dtype, "r+", shape=shape)
        # The lock goes with the process that holds it.
        fcntl.flock(file, fcntl.LOCK_EX)
        if os.pread(file.fileno(), 1, size) != b"\1":
            fill(array)
            os.pwrite(file.fileno(), b"\1", size)
        # The mapping keeps the file open, and would keep the lock.
        fcntl.flock(file, fcntl.LOCK_UN)
    return array


@contextmanager
def _alone(folder: str) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _create(name: str, size: int, on_disk: bool) -> BinaryIO:
    if on_disk or not hasattr(os, "memfd_create"):
        descriptor, path = tempfile.mkstemp(prefix=name)
        os.unlink(path)
        file = os.fdopen(descriptor, "r+b", buffering=0)
        # A write to a mapped page that finds the disk full would kill the process.
        os.posix_fallocate(descriptor, 0, size)
    else:
        file = os.fdopen(os.memfd_create(name), "r+b", buffering=0)
        os.truncate(file.fileno(), size)
    return file


def _find(name: str) -> BinaryIO | None:
    # Processes and their files go while one looks, and other users' are closed.
    for process in filter(str.isdecimal, _list(_PROC)):
        for number in _list(f"{_PROC}/{process}/fd"):
            link = f"{_PROC}/{process}/fd/{number}"
            with contextlib.suppress(OSError):
                if name in os.readlink(link):
                    return open(link, "r+b", buffering=0)
    return None


def _list(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []
