"""A list of files or URIs, one a line: of pictures, of Parquet files or of shards."""

import posixpath
from collections import Counter
from collections.abc import Callable

import pyarrow.fs as pafs

from captioner import storage
from captioner.errors import SourceError
from captioner.sources import folder, parquet, shards
from captioner.sources.base import Source
from captioner.sources.encodings import decode_text
from captioner.sources.folder import FolderSource
from captioner.sources.listing import no_path
from captioner.sources.parquet import ParquetSource
from captioner.sources.parquet_files import is_parquet
from captioner.sources.place import Place
from captioner.sources.shard_index import is_shard
from captioner.sources.shards import ShardSource

SUFFIXES = (".txt", ".lst", ".list")
OPTIONS = folder.OPTIONS | parquet.OPTIONS | shards.OPTIONS
"""Settings of ``SourceConfig`` that say something here."""


def open_place(place: Place) -> Source | None:
    """What a text file lists. Names without a scheme that are not absolute begin where the list is; a picture's id is
    its line.

    Raises:
        SourceError: a file is not there and ``missing`` does not say that it may be, or they are of several kinds.
    """
    if place.files is not None or not place.uri.lower().endswith(SUFFIXES):
        return None
    text = decode_text(place.spec, storage.read_bytes(place.uri), place.options)
    lines = list(dict.fromkeys(line.strip() for line in text.split("\n") if line.strip()))
    left_out: Counter[str] = Counter()
    for line in lines:
        if why := _no_place(line):
            left_out[why] += 1
    lines = [line for line in lines if not _no_place(line)]
    # A run about pictures that has begun misses what goes, and goes on.
    goes_on = place.beginning is not None and place.beginning.kind == "folder"
    files = _look_up(place, lines, missing="skip" if goes_on else place.options.missing)
    if len(files) < len(lines):
        left_out["missing file"] = len(lines) - len(files)
    where = posixpath.dirname(place.uri)
    today = storage.FileTable.collect(where, files, anywhere=True)
    if goes_on:
        begun = place.or_begun("folder", today)
        images = storage.FileTable(where, begun.batches(), anywhere=True)
        return FolderSource(place.uri, images, left_out, place, today=today, listed=True)
    if not files:
        raise SourceError(f"{place.spec}: lists no file that is there")
    kinds: tuple[Callable[[str], bool], ...] = (is_parquet, is_shard)
    for kind in kinds:
        found = [file for file in files if kind(file.path)]
        if found and len(found) < len(files):
            other = next(file for file in files if not kind(file.path))
            raise SourceError(
                f"{place.spec}: lists both {found[0].path} and {other.path}: make a list of each kind"
            )
    if is_parquet(files[0].path):
        captions = place.captions
        others = dict(left_out)
        return ParquetSource(place.uri, files, place.options, captions=captions, others=others)
    if is_shard(files[0].path):
        return ShardSource(place, files, single=True)
    return FolderSource(place.uri, today, left_out, place, listed=True)


def _no_place(line: str) -> str | None:
    """Why a line can name no file, in a word or two."""
    if "\0" in line:
        return "name with a zero byte"
    _, is_uri, key = line.partition("://")
    return no_path(key) if is_uri and not storage.is_local(line) else None


def _look_up(place: Place, lines: list[str], *, missing: str) -> list[storage.FileInfo]:
    """The files that are there, in the order of the list."""
    where = posixpath.dirname(place.uri)
    uris = [
        storage.absolute(line)
        if "://" in line or line.startswith(("/", "~"))
        else f"{where}/{line}"
        for line in lines
    ]
    found: dict[str, pafs.FileInfo] = {}
    by_store: dict[str, list[str]] = {}
    for uri in uris:
        scheme, _, rest = uri.rpartition("://")
        by_store.setdefault(f"{scheme}://{rest.partition('/')[0]}" if scheme else "", []).append(
            uri
        )
    for some in by_store.values():
        filesystem, _ = storage.resolve(some[0])
        paths = [storage.resolve(uri)[1] for uri in some]
        with storage.reading(place.uri):
            found.update(zip(some, filesystem.get_file_info(paths), strict=True))
    files = [
        storage.FileInfo(uri, line, found[uri].size, found[uri].mtime_ns)
        for line, uri in zip(lines, uris, strict=True)
        if found[uri].type == pafs.FileType.File
    ]
    if len(files) < len(lines) and missing == "error":
        there = {file.path for file in files}
        absent = [line for line in lines if line not in there]
        raise SourceError(
            f"{place.spec}: {len(absent)} of {len(lines)} files are not there ({', '.join(absent[:3])}): "
            "source-options.missing skip goes on without them"
        )
    return files
