"""Rows of a collection's captions, and files that are written of them."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from captioner import storage
from captioner.artifacts.collection import Tables
from captioner.artifacts.manifests import FileEntry, SourceIdentity
from captioner.artifacts.output import Output
from captioner.artifacts.tables import CAPTIONED_ROWS
from captioner.errors import StoreError

_EXPORTED = pa.schema(
    [field for field in CAPTIONED_ROWS if field.name not in ("size", "mtime", "sha256")]
)
# Small files are written so many at a time: an object store answers late.
_WRITERS = 16
_ROWS = 1024

Row = dict[str, Any]


def read_rows(tables: Tables) -> Iterator[tuple[SourceIdentity, Row]]:
    """Every row with its source, in the order of the files, without its thumbnail and what a collection that grows
    compares."""
    for entry in tables.entries():
        for table in tables.rows([entry], _EXPORTED):
            for row in table.to_pylist():
                yield tables.source(entry), row


def captioned(tables: Tables) -> Iterator[tuple[SourceIdentity, Row]]:
    """The same of pictures that have a caption."""
    return (found for found in read_rows(tables) if found[1]["error"] is None)


def json_lines(rows: Iterable[Row]) -> Iterator[bytes]:
    """Rows as JSON, each a line."""
    return (json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def write_rows(output: Output, path: str, lines: Iterable[bytes], header: bytes = b"") -> FileEntry:
    """Write a file of rows whole, and say what the manifest lists of it.

    Raises:
        StoreError: it cannot be written.
    """
    count, digest = 0, hashlib.sha256(header)
    with storage.atomic_writer(output.uri(path)) as target:
        size = target.write(header)
        for line in lines:
            digest.update(line)
            size += target.write(line)
            count += 1
    return FileEntry(path=path, bytes=size, rows=count, sha256=digest.hexdigest())


def create(uri: str, data: bytes) -> bool:
    """Write a local file unless anything else is there; the same is as good. Whether it is there now."""
    try:
        storage.create_exclusively(uri, data)
    except StoreError:
        path = Path(uri)
        if not os.path.lexists(path):
            raise
        try:
            return path.read_bytes() == data
        except OSError:  # a folder, a broken link, a file of somebody else
            return False
    return True


def each(
    act: Callable[[SourceIdentity, Row], None], rows: Iterator[tuple[SourceIdentity, Row]]
) -> None:
    """Write something for each row, several at a time.

    Raises:
        whatever ``act`` does.
    """
    with ThreadPoolExecutor(_WRITERS) as writers:
        while some := list(islice(rows, _ROWS)):
            for _ in writers.map(lambda one: act(*one), some):
                pass
