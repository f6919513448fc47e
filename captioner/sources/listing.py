"""The files below a directory: each once, under a name that is text; everything else counted by kind."""

import os
import posixpath
from collections import Counter
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

from captioner import storage
from captioner.artifacts.output import CLAIM
from captioner.errors import SourceError
from captioner.storage.faults import Fault, fault_of, told

# What other programs leave among pictures: thumbnails, the recycled, resource forks.
_FOREIGN = ("@eaDir", "__MACOSX", "#recycle", "$RECYCLE.BIN", "Thumbs.db", "desktop.ini")
_NO_MEDIA = ".nomedia"
_NOT_TEXT = "name that is not UTF-8"


def list_place(
    uri: str, exclude: Sequence[str] = ()
) -> tuple[list[storage.FileInfo], dict[str, int]]:
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
        root = storage.resolve(uri)[1]
        found = sorted(_walk(root, uri.rstrip("/"), left_out), key=lambda file: file.path)
    else:
        found = storage.list_files(uri)
    written = _folders_with(CLAIM, found)
    no_media = _folders_with(_NO_MEDIA, found)
    for glob in exclude:
        if not any(_matches(file.path, glob) for file in found):
            raise SourceError(f"source-options.exclude: {glob!r} matches no file below {uri}")
    files = []
    for file in found:
        if kind := _left_out(file.path, written, no_media, exclude):
            left_out[kind] += 1
        else:
            files.append(file)
    return files, dict(left_out)


def _walk(root: str, uri: str, left_out: Counter[str]) -> Iterator[storage.FileInfo]:
    """Files below a local directory. Arrow's own listing follows links in circles, and fails on any name or folder
    that is out of order."""
    real = os.path.realpath(root)
    # A directory still to be listed: its name below the root, its real path, and the folders that it was reached from.
    todo: list[tuple[str, str, tuple[str, ...]]] = [("", real, (real,))]
    while todo:
        below, real, reached_from = todo.pop()
        try:
            entries = sorted(os.scandir(real), key=lambda entry: entry.name)
        except OSError as error:
            _pass_on(error, f"{uri}/{below}")
            if not below:
                raise
            left_out["unreadable folder"] += 1
            continue
        for entry in entries:
            name = f"{below}/{entry.name}" if below else entry.name
            try:
                status = entry.stat()
                is_folder = entry.is_dir()
            except OSError as error:
                _pass_on(error, f"{uri}/{name}")
                left_out["broken link" if entry.is_symlink() else "unreadable file"] += 1
                continue
            if is_folder and entry.is_symlink():
                target = os.path.realpath(entry.path)
                if _is_inside(real, target):
                    left_out["circular link"] += 1
                elif any(_lists(start, target) for start in reached_from):
                    left_out["repeated link"] += 1
                else:
                    todo.append((name, target, (*reached_from, target)))
            elif is_folder:
                todo.append((name, f"{real.rstrip('/')}/{entry.name}", reached_from))
            elif not entry.is_file():
                left_out["special file"] += 1
            elif not _is_text(name):
                left_out[_NOT_TEXT] += 1
            else:
                yield storage.FileInfo(f"{uri}/{name}", name, status.st_size, status.st_mtime_ns)


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


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _folders_with(name: str, files: list[storage.FileInfo]) -> tuple[str, ...]:
    """Those that hold a file of this name, with a slash at the end; the listed directory itself is ""."""
    paths = (file.path for file in files if posixpath.basename(file.path) == name)
    return tuple(path.removesuffix(name) for path in paths)


def _left_out(
    path: str, written: tuple[str, ...], no_media: tuple[str, ...], exclude: Sequence[str]
) -> str | None:
    """Why a file is none of the source's, in a word or two; None of those that are."""
    # Keys of object stores that no path can name: Arrow lists them, and cannot open them.
    if {"", ".", ".."} & set(path.split("/")):
        return "key with //" if "" in path.split("/") else "key with . or .."
    if path.startswith(written):
        return "file of a job"
    if path.startswith(no_media):
        return f"{_NO_MEDIA} file"
    if any(_matches(path, glob) for glob in exclude):
        return "excluded file"
    return _hidden(path)


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
