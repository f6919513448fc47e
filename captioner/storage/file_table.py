"""Listings of many files, held in columns: a file takes what its name does and some twenty bytes more."""

import posixpath
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow.fs import S3FileSystem

from captioner.errors import StoreError
from captioner.storage.faults import told
from captioner.storage.files import FileInfo, absolute, list_files, resolve

BATCH = 10_000
FILE_SCHEMA = pa.schema(
    [
        pa.field("path", pa.string(), nullable=False),
        pa.field("size", pa.int64()),  # bytes
        pa.field("mtime", pa.int64()),  # nanoseconds since 1970
    ]
)


class FileTable(Sequence[FileInfo]):
    """Files below one directory, each made into a ``FileInfo`` when it is looked at."""

    def __init__(self, uri: str, batches: Iterable[pa.RecordBatch], *, anywhere: bool = False):
        """
        Args:
            uri: of the directory.
            batches: of ``FILE_SCHEMA``.
            anywhere: paths may also be absolute, or URIs, as in a list that somebody wrote.
        """
        self.uri = uri.rstrip("/")
        self.anywhere = anywhere
        self._batches = [batch for batch in batches if len(batch)]
        self._starts = np.cumsum([0, *(len(batch) for batch in self._batches)])

    @classmethod
    def collect(cls, uri: str, files: Iterable[FileInfo], *, anywhere: bool = False) -> "FileTable":
        """A table of files, in their order."""
        return cls(uri, _columns(iter(files)), anywhere=anywhere)

    def __len__(self) -> int:
        return int(self._starts[-1])

    @overload
    def __getitem__(self, index: int) -> FileInfo: ...
    @overload
    def __getitem__(self, index: slice) -> list[FileInfo]: ...
    def __getitem__(self, index: int | slice) -> FileInfo | list[FileInfo]:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        row = self._batches[number].slice(index - int(self._starts[number]), 1)
        return next(self._of(row))

    def __iter__(self) -> Iterator[FileInfo]:
        for batch in self._batches:
            yield from self._of(batch)

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The columns of ``FILE_SCHEMA``, some rows at a time."""
        return iter(self._batches)

    def take(self, wanted: Callable[[FileInfo], bool]) -> "FileTable":
        """Those that are wanted, which are then no longer in this one: nothing is held twice meanwhile."""
        taken: list[pa.RecordBatch] = []
        for number, batch in enumerate(self._batches):
            mask = pa.array([wanted(file) for file in self._of(batch)], pa.bool_())
            taken.append(_filter(batch, mask))
            self._batches[number] = _filter(batch, pc.invert(mask))
        self.__init__(self.uri, self._batches, anywhere=self.anywhere)  # type: ignore[misc]
        return FileTable(self.uri, taken, anywhere=self.anywhere)

    def _of(self, batch: pa.RecordBatch) -> Iterator[FileInfo]:
        for path, size, mtime in zip(*batch.to_pydict().values(), strict=True):
            elsewhere = self.anywhere and ("://" in path or path.startswith(("/", "~")))
            yield FileInfo(absolute(path) if elsewhere else f"{self.uri}/{path}", path, size, mtime)


def _filter(batch: pa.RecordBatch, mask: pa.Array) -> pa.RecordBatch:
    return batch if mask.true_count == len(batch) else batch.filter(mask)


def iter_files(uri: str) -> Iterator[FileInfo]:
    """``list_files``, without holding them all where the store is S3.

    Raises:
        StoreError: it cannot be listed, or is a file.
    """
    filesystem, path = resolve(uri)
    if not isinstance(filesystem, S3FileSystem):
        yield from list_files(uri)
        return
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, _, below = path.partition("/")
    prefix, base = posixpath.join(below, "") if below else "", absolute(uri)
    try:
        pages = boto3.client("s3").get_paginator("list_objects_v2")
        for page in pages.paginate(Bucket=bucket, Prefix=prefix):
            if "Name" not in page:
                raise StoreError(
                    f"cannot list {uri}: what answers is no S3, for it names no bucket"
                )
            for entry in page.get("Contents", ()):
                name = entry["Key"].removeprefix(prefix)
                if name and not name.endswith("/"):
                    mtime = int(entry["LastModified"].timestamp() * 1e9)
                    yield FileInfo(f"{base}/{name}", name, entry["Size"], mtime)
    except (BotoCoreError, ClientError) as error:
        raise told("list", uri, error) from error


def _columns(files: Iterator[FileInfo]) -> Iterator[pa.RecordBatch]:
    while some := list(islice(files, BATCH)):
        columns: list[list[Any]] = [
            [f.path for f in some], [f.size for f in some], [f.mtime for f in some]
        ]  # fmt: skip
        yield pa.record_batch(columns, schema=FILE_SCHEMA)
