"""The files below a directory: each once, under a name that is text; everything else counted by kind."""

import os
import posixpath
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from captioner import storage
from captioner.artifacts.output import CLAIM
from captioner.errors import SourceError
from captioner.storage.faults import Fault, fault_of, told

# What other programs leave among pictures: thumbnails, the recycled, resource forks.
_FOREIGN = ("@eaDir", "__MACOSX", "#recycle", "$RECYCLE.BIN", "Thumbs.db", "desktop.ini")
_NO_MEDIA = ".nomedia"
NOT_TEXT = "name that is not UTF-8"


def list_place(uri: str, exclude: Sequence[str] = ()) -> tuple[storage.FileTable, dict[str, int]]:
    """Files below a directory, sorted by path; and how many were left out, by kind.

    A folder that a link names is entered under the link's name, but not one that leads back up or is listed anyway.

    Args:
        exclude: globs of files or folders; one without ``/`` holds for a name at any depth.

    Raises:
        SourceError: a glob matches nothing.
        OutOfReachError: something in it cannot be listed now.
        StoreError, OSError: the directory cannot be listed.
    """
    left_out: Counter[str] = Counter()
    if storage.is_local(uri):
        every = _walk(storage.resolve(uri)[1], uri.rstrip("/"), left_out)
    else:
        every = storage.iter_files(uri)
    found = storage.FileTable.collect(uri.rstrip("/"), every)
    written = _folders_with(CLAIM, found)
    no_media = _folders_with(_NO_MEDIA, found)
    unmatched = set(exclude)

    def is_taken(file: storage.FileInfo) -> bool:
        unmatched.difference_update([glob for glob in unmatched if _matches(file.path, glob)])
        if kind := _left_out(file.path, written, no_media, exclude):
            left_out[kind] += 1
        return kind is None

    found = found.take(is_taken)
    for glob in exclude:
        if glob in unmatched:
            raise SourceError(f"source-options.exclude: {glob!r} matches no file below {uri}")
    return found, dict(left_out)


@dataclass
class _Folder:
    """One that is being walked through."""

    below: str
    """Its name below the root, with a slash behind it; "" for the root."""
    real: str
    """Its real path."""
    reached_from: tuple[str, ...]
    """The folders that it was reached from by links, the root first."""
    names: list[bytes]
    """Of what is left in it, the last one first: each is let go of when its file goes into the listing."""


def _walk(root: str, uri: str, left_out: Counter[str]) -> Iterator[storage.FileInfo]:
    """Files below a local directory, in the order of their paths. Arrow's own listing follows links in circles, and
    fails on any name or folder that is out of order."""
    real = os.path.realpath(root)
    # No recursion, which Python ends sooner than a path does.
    open_folders = [_Folder("", real, (real,), _names(real))]

    def enter(below: str, real: str, reached_from: tuple[str, ...]) -> None:
        try:
            open_folders.append(_Folder(below, real, reached_from, _names(real)))
        except OSError as error:
            _pass_on(error, f"{uri}/{below}".rstrip("/"))
            left_out["unreadable folder"] += 1

    while open_folders:
        folder = open_folders[-1]
        if not folder.names:
            open_folders.pop()
            continue
        raw = folder.names.pop()
        entry = os.fsdecode(raw.removesuffix(b"/"))
        name, path = folder.below + entry, f"{folder.real.rstrip('/')}/{entry}"
        is_link = False
        try:
            status = os.lstat(path)
            if is_link := stat.S_ISLNK(status.st_mode):
                status = os.stat(path)
        except OSError as error:
            _pass_on(error, f"{uri}/{name}")
            left_out["broken link" if is_link else "unreadable file"] += 1
            continue
        if stat.S_ISDIR(status.st_mode):
            if not raw.endswith(b"/"):
                # Its files come after those that begin with its name and a character before the slash.
                _put_back(folder.names, raw + b"/")
                continue
            target = os.path.realpath(path) if is_link else path
            if not is_link:
                enter(f"{name}/", path, folder.reached_from)
            elif _is_inside(folder.real, target):
                left_out["circular link"] += 1
            elif any(_lists(start, target) for start in folder.reached_from):
                left_out["repeated link"] += 1
            else:
                enter(f"{name}/", target, (*folder.reached_from, target))
        elif not stat.S_ISREG(status.st_mode):
            left_out["special file"] += 1
        elif not is_text(name):
            left_out[NOT_TEXT] += 1
        else:
            yield storage.FileInfo(f"{uri}/{name}", name, status.st_size, status.st_mtime_ns)


def _names(real: str) -> list[bytes]:
    names = os.listdir(os.fsencode(real))
    names.sort(reverse=True)
    return names


def _put_back(names: list[bytes], name: bytes) -> None:
    """Into a list in descending order."""
    low, high = 0, len(names)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if names[middle] > name else (low, middle)
    names.insert(low, name)


def _pass_on(error: OSError, uri: str) -> None:
    """
    Raises:
        OutOfReachError: it is a fault that passes: what cannot be seen now is not to be left out.
    """
    if fault_of(error) == Fault.PASSING:
        raise told("list", uri, error) from error


def _is_inside(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _lists(start: str, folder: str) -> bool:
    """Whether a folder is listed under its own name, by whoever lists ``start``."""
    return _is_inside(folder, start) and _hidden(folder[len(start) :].strip("/") + "/") is None


def is_text(name: str) -> bool:
    """Whether a name of a file is UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _folders_with(name: str, files: Iterable[storage.FileInfo]) -> tuple[str, ...]:
    """Those that hold a file of this name, with a slash at the end; the listed directory itself is ""."""
    paths = (file.path for file in files if posixpath.basename(file.path) == name)
    return tuple(path.removesuffix(name) for path in paths)


def _left_out(
    path: str, written: tuple[str, ...], no_media: tuple[str, ...], exclude: Sequence[str]
) -> str | None:
    """Why a file is none of the source's, in a word or two; None of those that are."""
    if kind := no_path(path):
        return kind
    if path.startswith(written):
        return "file of a job"
    if path.startswith(no_media):
        return f"{_NO_MEDIA} file"
    if any(_matches(path, glob) for glob in exclude):
        return "excluded file"
    return _hidden(path)


def no_path(key: str) -> str | None:
    """Why no path can name an object's key, in a word or two: Arrow lists such, and cannot open them."""
    parts = key.split("/")
    if "" in parts:
        return "key with //"
    return "key with . or .." if {".", ".."} & set(parts) else None


def _hidden(path: str) -> str | None:
    *directories, name = path.split("/")
    if name.startswith("._"):
        return "._ file"
    for part in path.split("/"):
        if part in _FOREIGN:
            return part if part == name else f"{part} file"
    # Cameras name pictures _DSC0001.JPG: "_" hides directories only (_temporary, _delta_log).
    if name.startswith(".") or any(part.startswith((".", "_")) for part in directories):
        return "hidden file"
    return None


def _matches(path: str, glob: str) -> bool:
    """Whether a glob names a file, or a folder that it is in."""
    parts = path.split("/")
    if "/" not in glob.strip("/"):
        return any(fnmatchcase(part, glob.strip("/")) for part in parts)
    heads = ("/".join(parts[: number + 1]) for number in range(len(parts)))
    return any(fnmatchcase(head, glob.strip("/")) for head in heads)
