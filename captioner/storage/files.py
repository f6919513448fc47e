"""Files behind URIs: local paths, ``s3://``, anything pyarrow.fs opens. Written whole or not at all."""

import contextlib
import json
import os
import re
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.fs as pafs

from captioner.errors import StoreError
from captioner.storage.faults import Fault, fault_of, one_line, told

# Where S3 is, in the names that AWS's own tools read. Not who may use it: those are secrets.
S3_ADDRESS_VARIABLES = (
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
)


class DamagedError(StoreError):
    """A file is not what was written."""


@dataclass(frozen=True)
class FileInfo:
    """A file below a listed directory."""

    uri: str
    path: str
    """POSIX path relative to the listed directory."""
    size: int
    """Bytes."""
    mtime: int | None = None
    """When it was changed, in nanoseconds since 1970; None where the store does not say."""


_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*", re.I)


@cache
def _local() -> pafs.FileSystem:
    return pafs.LocalFileSystem()


@cache
def _s3(bucket: str, endpoint: str | None, region: str | None) -> pafs.S3FileSystem:
    # Arrow reads credentials from the usual AWS variables; the endpoint is passed on so that both names AWS tools
    # accept work, and so that the file system, pickled into Ray tasks, carries it to nodes without the variable.
    if endpoint:
        parts = urlsplit(endpoint)
        return pafs.S3FileSystem(
            endpoint_override=parts.netloc or parts.path,
            scheme=parts.scheme or "https",
            region=region or "us-east-1",
        )
    return pafs.S3FileSystem(region=region or pafs.resolve_s3_region(bucket))


def resolve(uri: str) -> tuple[pafs.FileSystem, str]:
    """The file system of ``uri`` and the path on it.

    Raises:
        StoreError: the scheme is unknown or the URI malformed.
    """
    uri = absolute(uri)
    scheme, is_uri, _ = uri.partition("://")
    if not is_uri:
        return _local(), uri
    if scheme == "hf":  # which Arrow hands on to a library of the hub's own
        raise StoreError(
            f"cannot open {uri}: not a place for files; what is on the hub is hf:org/name"
        )
    try:
        if scheme == "s3":
            path = uri.removeprefix("s3://").rstrip("/")
            endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
            region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
            return _s3(path.partition("/")[0], endpoint, region), path
        filesystem, path = pafs.FileSystem.from_uri(uri)
        return filesystem, path
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise told("open", uri, error) from error


def absolute(uri: str) -> str:
    """``uri`` itself if it has a scheme, else the absolute local path; that of a ``file://`` URI, too.

    Raises:
        StoreError: it names nothing, or no path on this machine: another host's, an unknown user's home, no UTF-8.
    """
    if not uri:
        raise StoreError("an empty path names nothing: the current directory is .")
    try:
        uri.encode()
    except UnicodeEncodeError as error:
        raise StoreError(f"{uri!a} is not UTF-8, as names of files must be here") from error
    scheme, is_uri, rest = re.sub(r"^file:/(?!/)", "file:///", uri, flags=re.I).partition("://")
    if is_uri and _SCHEME.fullmatch(scheme):
        if scheme.lower() == "file":
            # '#' and '?' begin nothing here: whoever leaves them as they are means the file.
            host, _, path = rest.partition("/")
            if host not in ("", "localhost"):
                raise StoreError(f"{uri} is on another host: file:///path names a file of this one")
            return os.path.normpath(f"/{unquote(path)}")
        if not rest.strip("/"):
            raise StoreError(f"{uri} names nothing: a bucket or a path belongs behind it")
        return f"{scheme.lower()}://{rest.rstrip('/')}"
    try:
        return str(Path(uri).expanduser().absolute())
    except RuntimeError as error:  # ~name of nobody here
        raise StoreError(f"cannot open {uri}: {one_line(error)}") from error


def join(uri: str, *parts: str) -> str:
    """``uri`` extended by path components."""
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


def is_local(uri: str) -> bool:
    """Whether it is a path of this machine."""
    return "://" not in absolute(uri)


def exists(uri: str) -> bool:
    """Whether a file or directory is there.

    Raises:
        StoreError: the store does not say.
    """
    return bool(_type(uri) != pafs.FileType.NotFound)


def is_directory(uri: str) -> bool:
    """Whether a directory is there.

    Raises:
        StoreError: the store does not say.
    """
    return bool(_type(uri) == pafs.FileType.Directory)


def is_file(uri: str) -> bool:
    """Whether a regular file is there.

    Raises:
        StoreError: the store does not say.
    """
    return bool(_type(uri) == pafs.FileType.File)


def _type(uri: str) -> pafs.FileType:
    filesystem, path = resolve(uri)
    with _told("look at", uri):
        return filesystem.get_file_info(path).type


def list_files(uri: str) -> list[FileInfo]:
    """All files below a directory, sorted by path; empty if it is absent.

    Raises:
        StoreError: it cannot be listed, or is a file.
    """
    filesystem, path = resolve(uri)
    base = absolute(uri)
    with _told("list", uri):
        if is_local(uri):
            return [FileInfo(f"{base}/{name}", name, *of) for name, *of in sorted(_walk(path))]
        below = pafs.FileSelector(path, recursive=True, allow_not_found=True)
        found = filesystem.get_file_info(below)
    files = (entry for entry in found if entry.type == pafs.FileType.File)
    relative = ((e.path[len(path.rstrip("/")) + 1 :], e.size, e.mtime_ns) for e in files)
    return [FileInfo(f"{base}/{name}", name, size, mtime) for name, size, mtime in sorted(relative)]


def _walk(root: str) -> Iterator[tuple[str, int, int]]:
    """Path, size and time of the files below a local directory. Arrow's own listing fails on names that are no UTF-8,
    and follows links in circles."""

    def fail(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):  # another process may delete it meanwhile
            raise error

    for folder, _, names in os.walk(root, onerror=fail):
        for path in (os.path.join(folder, name) for name in names):
            with contextlib.suppress(FileNotFoundError):
                status = os.stat(path)
                if stat.S_ISREG(status.st_mode):
                    yield os.path.relpath(path, root), status.st_size, status.st_mtime_ns


@contextmanager
def open_input(uri: str) -> Iterator[pa.NativeFile]:
    """A seekable file for reading.

    Raises:
        StoreError: it cannot be opened.
    """
    filesystem, path = resolve(uri)
    with _told("read", uri):
        file = filesystem.open_input_file(path)
    with file:
        yield file


def read_bytes(uri: str) -> bytes:
    """The whole file.

    Raises:
        StoreError: it cannot be read.
    """
    with open_input(uri) as file, _told("read", uri):
        data: bytes = file.read()
    return data


@contextmanager
def new_partial(path: Path) -> Iterator[Path]:
    """Where a local file is written before it gets its name. A killed process leaves it: see ``is_partial``."""
    # Not longer than the longest name there can be, whatever its own is.
    partial = path.with_name(f".{uuid.uuid4().hex}.partial")
    try:
        yield partial
    finally:
        partial.unlink(missing_ok=True)


def is_partial(path: str) -> bool:
    """Whether a file is what a killed process has left of another."""
    return re.search(r"\.[0-9a-f]{32}\.partial$", path) is not None


@contextmanager
def atomic_writer(uri: str) -> Iterator[BinaryIO]:
    """A file for writing that appears under its name only when the block ends without an error.

    Raises:
        StoreError: it cannot be written (the disk is full, access is denied).
    """
    filesystem, path = resolve(uri)
    with _told("write", uri):
        if is_local(uri):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            with new_partial(Path(path)) as partial:
                with partial.open("wb") as file:
                    yield file
                    file.flush()
                    os.fsync(file.fileno())
                partial.replace(path)
        else:
            # Closing an object store's stream publishes the object whatever happened, so it is opened last.
            with tempfile.SpooledTemporaryFile(max_size=2**26) as spool:
                yield spool  # type: ignore[misc]
                spool.seek(0)
                with filesystem.open_output_stream(path) as stream:
                    shutil.copyfileobj(spool, stream, 2**24)


def write_bytes(uri: str, data: bytes) -> None:
    """Write a whole file atomically; an existing one is replaced."""
    with atomic_writer(uri) as file:
        file.write(data)


def delete(uri: str) -> None:
    """Delete a file, or a directory with all in it; another process may do the same.

    Raises:
        StoreError: it cannot be deleted.
    """
    filesystem, path = resolve(uri)
    with _told("delete", uri), contextlib.suppress(FileNotFoundError):
        kind = filesystem.get_file_info(path).type
        if kind == pafs.FileType.Directory:
            filesystem.delete_dir(path)
        elif kind == pafs.FileType.File:
            filesystem.delete_file(path)


def copy_file(source: str, target: str) -> None:
    """Copy one file between any two URIs, in pieces."""
    with open_input(source) as reader, atomic_writer(target) as writer:
        while piece := reader.read(2**24):
            writer.write(piece)


@contextmanager
def reading(uri: str) -> Iterator[None]:
    """What Arrow raises while it reads a table, as ours.

    Raises:
        DamagedError: the file is not what was written.
        StoreError: it is missing, or access is denied.
        OutOfReachError: the store does not answer.
    """
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        if isinstance(error, OSError) and (error.errno or fault_of(error) != Fault.OTHER):
            raise told("read", uri, error) from error
        raise DamagedError(f"{uri} is damaged: {one_line(error)}") from error


def read_json(uri: str) -> Any:
    """A parsed JSON file.

    Raises:
        StoreError: it cannot be read, or is not JSON.
    """
    try:
        return json.loads(read_bytes(uri))
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{uri} is not JSON: {one_line(error)}") from error


@contextmanager
def _told(what: str, uri: str) -> Iterator[None]:
    """The file system's own errors as ours, in one line."""
    try:
        yield
    except (
        OSError,
        pa.ArrowInvalid,
    ) as error:  # ArrowInvalid: of a name that the store does not take
        raise told(what, uri, error) from error
