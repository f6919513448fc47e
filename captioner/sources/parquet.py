"""Parquet files in the schema of the Hugging Face hub: an ``image`` column, captions beside it or none."""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq

from captioner import storage
from captioner.config import SourceConfig
from captioner.errors import SourceError, StoreError
from captioner.schema import CAPTION_ROWS, SourceIdentity
from captioner.sources.tasks import Piece, PieceSource, source_rows

ROWS_PER_PIECE = 128
_LIST_COLUMNS = ("captions", "caption", "sentences", "raw")
_SPLITS = {
    "train": "train", "training": "train", "validation": "validation", "valid": "validation",
    "val": "validation", "dev": "validation", "test": "test", "testing": "test",
}  # fmt: skip


@dataclass(frozen=True)
class _File:
    uri: str
    name: str
    split: str
    size: int
    groups: tuple[int, ...]
    """Rows of each row group."""
    first: int
    """Rows of its split in the files before it."""

    @property
    def rows(self) -> int:
        return sum(self.groups)


class ParquetSource:
    """A Parquet file or a directory of them, split by file name (``train-00000-of-00003.parquet``).

    An image's id is its split and its row within the split, over the split's files in sorted order.
    """

    def __init__(self, uri: str, options: SourceConfig, name: str | None = None):
        self.uri = uri
        self.name = name or uri
        self.limit = options.limit
        self._files = _open_files(uri, options)
        self._image, self._captions = _columns(self._files[0])

    def identity(self) -> SourceIdentity:
        listing = "".join(f"{file.name}:{file.rows}:{file.size};" for file in self._files)
        return SourceIdentity(
            kind="parquet",
            uri=self.name,
            options={"files": hashlib.sha256(listing.encode()).hexdigest(), "limit": self.limit},
        )

    def num_images(self) -> int:
        return sum(rows for _, _, _, rows in self._slices())

    def images(self) -> PieceSource:
        pieces = [
            Piece(
                partial(_read_images, file, self._image, group, start, rows),
                rows,
                file.size * rows // max(1, file.rows),
            )
            for file, group, start, rows in self._slices()
        ]
        return PieceSource("Parquet", pieces)

    def captions(self) -> Iterator[pa.RecordBatch]:
        if not self._captions:
            return
        for file in self._files:
            keep = min(file.rows, (self.limit or file.rows + file.first) - file.first)
            if keep <= 0:
                continue
            row = file.first
            with storage.open_input(file.uri) as handle:
                for batch in pq.ParquetFile(handle).iter_batches(columns=self._captions):
                    rows = batch.slice(0, file.first + keep - row).to_pylist()
                    yield _caption_rows(file.split, row, rows, self._captions)
                    row += len(rows)

    def _slices(self) -> Iterator[tuple[_File, int, int, int]]:
        """(file, row group, first row within it, rows) of every piece."""
        for file in self._files:
            row = file.first
            for group, rows in enumerate(file.groups):
                keep = rows if self.limit is None else max(0, min(rows, self.limit - row))
                for start in range(0, keep, ROWS_PER_PIECE):
                    yield file, group, start, min(ROWS_PER_PIECE, keep - start)
                row += rows


def read_cell(uri: str) -> bytes:
    """The image behind ``file.parquet#row``."""
    file_uri, _, row_text = uri.rpartition("#")
    row = int(row_text)
    with storage.open_input(file_uri) as handle:
        file = pq.ParquetFile(handle)
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if row < rows:
                column = next(name for name in ("image", "bytes") if name in file.schema_arrow.names)
                value = file.read_row_group(group, columns=[column])[column][row].as_py()
                return bytes(value["bytes"] if isinstance(value, dict) else value)
            row -= rows
    raise SourceError(f"{uri}: the file has no such row")


def _open_files(uri: str, options: SourceConfig) -> list[_File]:
    if uri.endswith(".parquet"):
        found = [storage.FileInfo(uri, uri.rpartition("/")[2], 0)]
    else:
        found = [file for file in storage.list_files(uri) if file.path.endswith(".parquet")]
    files: list[_File] = []
    rows: dict[str, int] = {}
    for info in found:
        try:
            with storage.open_input(info.uri) as handle:
                size = handle.size()
                metadata = pq.ParquetFile(handle).metadata
        except (pa.ArrowInvalid, StoreError, OSError) as error:
            raise SourceError(f"{info.uri}: not readable as Parquet: {error}") from error
        groups = tuple(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
        split = _split(info.path, options)
        files.append(_File(info.uri, info.path, split, size, groups, rows.get(split, 0)))
        rows[split] = rows.get(split, 0) + sum(groups)
    if not sum(rows.values()):
        raise SourceError(f"{uri}: the Parquet files hold no rows")
    return files


def _split(path: str, options: SourceConfig) -> str:
    if options.split != "auto":
        return options.split
    for word in re.split(r"[^a-z]+", path.lower()):
        if word in _SPLITS:
            return _SPLITS[word]
    return "train"


def _columns(file: _File) -> tuple[str, list[str]]:
    with storage.open_input(file.uri) as handle:
        schema = pq.ParquetFile(handle).schema_arrow
    image = next((name for name in ("image", "bytes") if name in schema.names), None)
    if image is None:
        raise SourceError(f"{file.uri}: no column 'image'; it has: {', '.join(schema.names)}")
    numbered = sorted(
        (name for name in schema.names if re.fullmatch(r"caption_\d+", name)),
        key=lambda name: int(name.rpartition("_")[2]),
    )
    if numbered:
        return image, numbered
    return image, [name for name in _LIST_COLUMNS if name in schema.names][:1]


def _read_images(file: _File, column: str, group: int, start: int, rows: int) -> Iterator[pa.Table]:
    before = sum(file.groups[:group]) + start
    with storage.open_input(file.uri) as handle:
        # Batches, not the whole row group: hub files hold thousands of images in one.
        batches = pq.ParquetFile(handle).iter_batches(
            batch_size=ROWS_PER_PIECE, row_groups=[group], columns=[column]
        )
        batch = next(batch for number, batch in enumerate(batches) if number * ROWS_PER_PIECE == start)
    values = [
        value.get("bytes") if isinstance(value, dict) else value for value in batch.column(0).to_pylist()
    ][:rows]
    yield source_rows(
        [f"{file.split}-{file.first + before + row:06d}" for row in range(rows)],
        [file.split] * rows,
        [f"{file.uri}#{before + row}" for row in range(rows)],
        values,
        [None if value is not None else "no image bytes in the row" for value in values],
    )


def _caption_rows(
    split: str, first: int, rows: list[dict[str, str | list[str] | None]], columns: list[str]
) -> pa.RecordBatch:
    ids, texts, indices = [], [], []
    for offset, row in enumerate(rows):
        values: list[str | None] = []
        for name in columns:
            value = row[name]
            values += value if isinstance(value, list) else [value]
        for index, text in enumerate(text for text in values if text):
            ids.append(f"{split}-{first + offset:06d}")
            texts.append(text)
            indices.append(index)
    return pa.RecordBatch.from_arrays(
        [pa.array(ids, pa.string()), pa.array(texts, pa.string()), pa.array(indices, pa.int32())],
        schema=CAPTION_ROWS,
    )
