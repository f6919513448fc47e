"""Stores that stand still from their k-th change on, whoever asks: what a kill of all processes leaves of a run."""

import contextlib
import fcntl
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from tests.s3 import S3Server

NEVER = 10**9


class StoppedError(Exception):
    """The store stands still."""


class Tickets:
    """Counts changes over processes of this machine, by a file, and lets only so many happen."""

    def __init__(self, file: Path, most: int):
        self.file, self.most = str(file), most
        file.write_text("0")

    def grant(self, changes: int = 1) -> bool:
        with open(self.file, "r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            taken = int(file.read()) + changes
            file.seek(0)
            file.write(str(taken))
        return taken <= self.most

    def take(self, changes: int = 1) -> None:
        if not self.grant(changes):
            raise StoppedError

    @property
    def taken(self) -> int:
        return int(Path(self.file).read_text())


def _changing(name: str) -> Callable[..., Any]:
    def method(self: "StoppingHandler", *arguments: Any) -> Any:
        self.tickets.take()
        return getattr(self.inner, name)(*arguments)

    return method


def _looking(name: str) -> Callable[..., Any]:
    def method(self: "StoppingHandler", *arguments: Any) -> Any:
        self.tickets.take(0)
        return getattr(self.inner, name)(*arguments)

    return method


class StoppingHandler(pafs.FileSystemHandler):
    """The local file system; travels into workers with the file system that it makes."""

    def __init__(self, tickets: Tickets):
        self.tickets = tickets
        self.inner = pafs.LocalFileSystem()

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.tickets.file, self.tickets.most)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StoppingHandler)

    def get_type_name(self) -> str:
        return "stopping"

    def normalize_path(self, path: str) -> str:
        return str(self.inner.normalize_path(path))

    get_file_info = _looking("get_file_info")
    open_input_stream = _looking("open_input_stream")
    open_input_file = _looking("open_input_file")
    delete_dir = _changing("delete_dir")
    delete_file = _changing("delete_file")
    move = _changing("move")
    copy_file = _changing("copy_file")

    def get_file_info_selector(self, selector: pafs.FileSelector) -> Any:
        self.tickets.take(0)
        return self.inner.get_file_info(selector)

    def create_dir(self, path: str, recursive: bool) -> None:
        self.tickets.take(not os.path.isdir(path))
        self.inner.create_dir(path, recursive=recursive)

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        self.tickets.take()
        self.inner.delete_dir_contents(path, missing_dir_ok=missing_dir_ok)

    def delete_root_dir_contents(self) -> None:
        raise NotImplementedError

    def open_output_stream(self, path: str, metadata: Any) -> pa.PythonFile:
        self.tickets.take()
        return pa.PythonFile(_Stream(self.inner.open_output_stream(path), self.tickets), mode="w")

    def open_append_stream(self, path: str, metadata: Any) -> pa.PythonFile:
        raise NotImplementedError


def _rebuild(file: str, most: int) -> StoppingHandler:
    tickets = object.__new__(Tickets)
    tickets.file, tickets.most = file, most
    return StoppingHandler(tickets)


class _Stream:
    """A file half of which is on the disk before the rest may follow."""

    closed = False

    def __init__(self, inner: Any, tickets: Tickets):
        self._inner, self._tickets, self._begun = inner, tickets, False

    def write(self, data: Any) -> int:
        data = bytes(data)
        if not self._begun:
            self._begun = True
            half = len(data) // 2
            self._inner.write(data[:half])
            self._inner.flush()
            self._tickets.take()
            self._inner.write(data[half:])
        else:
            self._tickets.take(0)
            self._inner.write(data)
        return len(data)

    def flush(self) -> None:
        self._inner.flush()

    def tell(self) -> int:
        return int(self._inner.tell())

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._inner.close()
            self._tickets.take()


_audited: list[tuple[str, Tickets]] = []
_PATHS = {"os.rename": 2, "os.link": 2, "os.remove": 1, "os.mkdir": 1, "os.rmdir": 1}


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    """What this process changes without Arrow's file system. A hook of Python's cannot be taken away again."""
    if not _audited:
        return
    root, tickets = _audited[-1]
    if event == "open":
        paths, changes = arguments[:1], bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    elif event in _PATHS:
        paths, changes = arguments[: _PATHS[event]], True
    else:
        return
    if any(isinstance(p, str | os.PathLike) and os.fspath(p).startswith(root) for p in paths):
        tickets.take(changes)


sys.addaudithook(_audit)


@contextlib.contextmanager
def stopping_locally(root: Path, tickets: Tickets) -> Iterator[None]:
    """The directory stands still, for this process and for tasks it hands its file system to, once the tickets are
    gone; all of it as it is then, half-written files too."""
    from captioner.storage import files

    plain = files._local
    files._local = lambda: pafs.PyFileSystem(StoppingHandler(tickets))  # type: ignore[assignment]
    _audited.append((str(root), tickets))
    try:
        yield
    finally:
        _audited.pop()
        files._local = plain


@contextlib.contextmanager
def stopping_on_s3(server: S3Server, tickets: Tickets) -> Iterator[None]:
    """The server refuses whatever it is asked once the tickets are gone."""
    server.tickets = tickets
    try:
        yield
    finally:
        server.tickets = None
