"""Parquet files in the schema of the Hugging Face hub: an ``image`` column, captions beside it or none."""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow.fs import FileSystem

from captioner import storage
from captioner.config import SourceConfig, Split
from captioner.errors import SourceError, StoreError
from captioner.schema import CAPTION_ROWS, SourceIdentity
from captioner.sources.parquet_files import InspectedFile, open_file, open_files
from captioner.sources.splits import hashed_split, split_in_name
from captioner.sources.tasks import BYTES_PER_PIECE, Piece, PieceSource, one_line, source_rows

ROWS_PER_PIECE = 128
# Reading the middle of a row group means reading all before it, so a large one is cut into few slices.
SLICES_PER_GROUP = 8
# Read page by page; the default takes in the image column of a whole row group at once, of any size.
_READ_BUFFER = 4 * 2**20


@dataclass(frozen=True)
class _Slice:
    """Rows that one task reads; ``skip`` counts from the first row of ``groups``, ``row`` in the file."""

    filesystem: FileSystem
    path: str
    uri: str
    column: str
    groups: range
    skip: int
    row: int
    rows: int
    ids: "_Ids"


@dataclass(frozen=True)
class _Ids:
    """Ids and splits of a file's rows, which are numbered over all files of their split."""

    named: Split | None
    """Split of the file by its name."""
    other: Split | None
    """Split of rows in files that name none; None: by a hash of the id."""
    first: int
    """Number of the file's first row."""

    def image_id(self, row: int) -> str:
        return f"{self.named or 'image'}-{self.first + row:06d}"

    def split(self, row: int) -> Split:
        return self.named or self.other or hashed_split(self.image_id(row))


class ParquetSource:
    """A Parquet file or a directory of them, split by file name (``train-00000-of-00003.parquet``).

    An image's id is its split and its row within the split, over the split's files in sorted order
    (``train-000123``); rows of files that name no split are ``image-000123``. A limit counts these numbers.
    """

    def __init__(
        self,
        uri: str,
        files: list[storage.FileInfo] | None,
        options: SourceConfig,
        name: str | None = None,
    ):
        """
        Args:
            files: the Parquet files below ``uri``; None when ``uri`` is itself one.
            name: stands for the URI in the identity, where the files' place does not matter.

        Raises:
            SourceError: a file is unreadable, has no image column, differs from the others, or is missing.
        """
        self.uri = uri
        self.name = name or uri
        self.options = options
        self._files = open_files(uri, files)
        columns = self._files[0].columns
        for file in self._files:
            if file.columns != columns:
                raise SourceError(
                    f"{file.uri}: its columns {file.columns} differ from {self._files[0].path}'s {columns}"
                )
        other = options.split
        if other == "auto":
            self._other: Split | None = None if columns.captions else "test"
        else:
            self._other = other
        self._taken = list(self._take())

    def identity(self) -> SourceIdentity:
        listing = "".join(f"{file.path}:{file.rows}:{file.size};" for file in self._files)
        return SourceIdentity(
            kind="parquet",
            uri=self.name,
            options={
                "files": hashlib.sha256(listing.encode()).hexdigest(),
                "split": self.options.split,
                "limit": self.options.limit,
            },
        )

    def num_images(self) -> int:
        return sum(rows for _, _, rows in self._taken)

    def rows_by_split(self) -> dict[str, int]:
        """Rows in the files, by the split that their names say; whatever the limit."""
        counts: dict[str, int] = {}
        for file, ids, _ in self._taken:
            name = ids.named or "no split"
            counts[name] = counts.get(name, 0) + file.rows
        return counts

    def images(self) -> PieceSource:
        pieces = []
        for file, ids, taken in self._taken:
            for part in _slices(file, ids, taken):
                pieces.append(
                    Piece(partial(_read, part), part.rows, file.size * part.rows // file.rows)
                )
        return PieceSource("Parquet", pieces)

    def captions(self) -> Iterator[pa.RecordBatch]:
        for file, ids, taken in self._taken:
            columns = file.columns.captions
            if not columns or not taken:
                continue
            row = 0
            try:
                with storage.open_input(file.uri) as handle:
                    for batch in pq.ParquetFile(handle).iter_batches(columns=list(columns)):
                        rows = batch.slice(0, taken - row).to_pylist()
                        yield _caption_rows(ids, row, rows, columns)
                        row += len(rows)
                        if row == taken:
                            break
            except (pa.ArrowException, StoreError, OSError) as error:
                raise SourceError(
                    f"{file.uri}: captions cannot be read: {one_line(error)}"
                ) from error

    def _take(self) -> Iterator[tuple[InspectedFile, _Ids, int]]:
        """Each file with its ids and the number of rows taken from its beginning."""
        numbered: dict[Split | None, int] = {}
        for file in self._files:
            named = split_in_name(file.path)
            first = numbered.get(named, 0)
            numbered[named] = first + file.rows
            left = file.rows if self.options.limit is None else max(0, self.options.limit - first)
            yield file, _Ids(named, self._other, first), min(file.rows, left)


def read_cell(uri: str) -> bytes:
    """The image behind ``file.parquet#row``.

    Raises:
        SourceError: there is no such row, or no image in it.
        StoreError: the file cannot be read.
    """
    file_uri, _, row = uri.rpartition("#")
    file = open_file(storage.FileInfo(file_uri, file_uri.rpartition("/")[2], 0))
    for part in _slices(file, _Ids(None, "test", 0), file.rows):
        if row.isdecimal() and part.row <= int(row) < part.row + part.rows:
            value = _cells(part)[int(row) - part.row].as_py()
            if value is None:
                break
            return bytes(value)
    raise SourceError(f"{uri}: no image there")


def _slices(file: InspectedFile, ids: _Ids, taken: int) -> Iterator[_Slice]:
    """The first ``taken`` rows of a file, small row groups together and large ones cut."""
    # Opened once and sent along: workers may lack the endpoint of an S3 store.
    filesystem, path = storage.resolve(file.uri)
    group, row = 0, 0
    while row < taken:
        first, rows = group, 0
        while group < len(file.groups) and (
            rows == 0 or rows + file.groups[group] <= ROWS_PER_PIECE
        ):
            rows += file.groups[group]
            group += 1
        keep = min(rows, taken - row)
        count = max(
            min(math.ceil(keep / ROWS_PER_PIECE), SLICES_PER_GROUP),
            math.ceil(file.size * keep / file.rows / BYTES_PER_PIECE),
        )
        step = math.ceil(keep / count)
        for skip in range(0, keep, step):
            yield _Slice(
                filesystem,
                path,
                file.uri,
                file.columns.image,
                range(first, group),
                skip,
                row + skip,
                min(step, keep - skip),
                ids,
            )
        row += rows


def _cells(part: _Slice) -> pa.ChunkedArray:
    """large_binary, one value for each row of the slice."""
    chunks = []
    position = 0
    with part.filesystem.open_input_file(part.path) as handle:
        batches = pq.ParquetFile(handle, buffer_size=_READ_BUFFER, pre_buffer=False).iter_batches(
            batch_size=ROWS_PER_PIECE, row_groups=list(part.groups), columns=[part.column]
        )
        for batch in batches:
            begin = max(0, part.skip - position)
            end = min(len(batch), part.skip + part.rows - position)
            if begin < end:
                chunks.append(batch.column(0).slice(begin, end - begin))
            position += len(batch)
            if position >= part.skip + part.rows:
                break
    column = pa.chunked_array(chunks)
    if pa.types.is_struct(column.type):
        column = pc.struct_field(column, "bytes")
    return column.cast(pa.large_binary())


def _read(part: _Slice) -> Iterator[pa.Table]:
    rows = range(part.row, part.row + part.rows)
    error = "no image bytes in the row"
    try:
        cells = _cells(part)
    except (pa.ArrowException, OSError) as problem:
        cells = pa.nulls(part.rows, pa.large_binary())
        error = f"cannot be read: {one_line(problem)}"
    yield source_rows(
        [part.ids.image_id(row) for row in rows],
        [part.ids.split(row) for row in rows],
        [f"{part.uri}#{row}" for row in rows],
        cells,
        [None if there else error for there in cells.is_valid().to_pylist()],
    )


def _caption_rows(
    numbering: _Ids,
    first: int,
    rows: list[dict[str, str | list[str | None] | None]],
    columns: tuple[str, ...],
) -> pa.RecordBatch:
    ids, texts, indices = [], [], []
    for offset, row in enumerate(rows):
        values: list[str | None] = []
        for name in columns:
            value = row[name]
            values += value if isinstance(value, list) else [value]
        for index, text in enumerate(text for text in values if text and text.strip()):
            ids.append(numbering.image_id(first + offset))
            texts.append(text)
            indices.append(index)
    return pa.RecordBatch.from_arrays(
        [pa.array(ids, pa.string()), pa.array(texts, pa.string()), pa.array(indices, pa.int32())],
        schema=CAPTION_ROWS,
    )
