"""Parquet files in the schema of the Hugging Face hub: an ``image`` column, captions beside it or none."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from captioner import storage
from captioner.artifacts.id_set import NONE, IdSet
from captioner.artifacts.manifests import SourceIdentity
from captioner.artifacts.tables import CAPTION_ROWS
from captioner.config import SourceConfig, Split
from captioner.errors import SourceError, StoreError
from captioner.sources.base import Listed
from captioner.sources.folder import is_image
from captioner.sources.outage import RETRY_SECONDS
from captioner.sources.parquet_files import (
    InspectedFile,
    holds_images,
    is_parquet,
    open_files,
    read_splits,
)
from captioner.sources.parquet_rows import Labels, slices
from captioner.sources.place import Place, suffix_of
from captioner.sources.splits import hashed_split, split_in_name
from captioner.sources.tasks import Piece, PieceSource
from captioner.storage.faults import one_line

_ROWS_PER_BATCH = 10_000


def open_place(place: Place) -> "ParquetSource | None":
    """Parquet files, or a directory of them and of no images.

    Raises:
        SourceError: the directory holds both.
    """
    if place.files is None:
        tables = None
        if not is_parquet(place.uri):
            return None
    else:
        tables = place.taken("parquet", is_parquet)
        _check_unchanged(place, tables)
        images = [file for file in place.files if is_image(file.path)]
        if images and not any(map(holds_images, tables)):
            return None  # captions of the images, or what a downloader notes
        if tables and images:
            raise SourceError(
                f"{place.spec}: holds both Parquet files ({tables[0].path}, ...) and images "
                f"({images[0].path}, ...): give the folder of one kind, or leave one out with source-options.exclude"
            )
        if not tables:
            return None
    return ParquetSource(
        place.uri,
        tables,
        place.options,
        captions=place.captions,
        others=place.beginning.left_out
        if place.beginning
        else dict(
            Counter(place.left_out)
            + Counter(suffix_of(f.path) for f in place.files or () if not is_parquet(f.path))
        ),
    )


def _check_unchanged(place: Place, tables: list[storage.FileInfo]) -> None:
    """Rows are known by their numbers, so that a file may be no other than the one that a run began with."""
    today = {file.path: file.size for file in place.files or ()}
    for file in tables:
        if place.beginning is not None and today.get(file.path) != file.size:
            raise SourceError(
                f"{file.uri} is gone or another since the run began: put it back, or use another output"
            )


class ParquetSource:
    """A Parquet file or a directory of them, split by a ``split`` column or by file name.

    An image's id is its split and its row within the split, over the split's files in sorted order
    (``train-000123`` in ``train-00000-of-00003.parquet``); where a column gives the split, or nothing does, it is
    ``image-000123``, counted over all files. Rows whose column is null, and files whose name says nothing, have the
    configured split.
    """

    def __init__(
        self,
        uri: str,
        files: list[storage.FileInfo] | None,
        options: SourceConfig,
        name: str | None = None,
        *,
        split_column: bool = True,
        captions: bool = True,
        others: dict[str, int] | None = None,
    ):
        """
        Args:
            files: the Parquet files below ``uri``; None when ``uri`` is itself one.
            name: stands for the URI in the identity, where the files' place does not matter.
            split_column: whether a column ``split``, if there is one, decides before the files' names.
            captions: False takes the images alone.
            others: files that are not read, by kind.

        Raises:
            SourceError: a file is unreadable, has no image column, differs from the others, names an unknown split,
                or is missing.
        """
        self.uri = uri
        self.name = name or uri
        self.options = options
        self._others = others or {}
        self._single = files is None
        self._files = open_files(uri, files, captions=captions)
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
        self._rows_by_split: dict[str, int] = {}
        by_row = split_column and columns.split is not None
        self._taken = list(self._take_rows() if by_row else self._take_files())

    def identity(self) -> SourceIdentity:
        listing = "".join(f"{file.path}:{file.rows}:{file.size};" for file in self._files)
        digest = hashlib.sha256(listing.encode()).hexdigest()
        return SourceIdentity(
            kind="parquet",
            uri=self.name,
            options={"limit": self.options.limit},
            listing=digest,
            # They lie in the same files.
            captions=f"{self.options.split} {digest}",
        )

    def files(self) -> Iterator[Listed]:
        for file in () if self._single else self._files:
            yield None, storage.FileInfo(file.uri, file.path, file.size, file.mtime)

    def num_images(self) -> int:
        return sum(len(labels.taken(range(rows))) for _, labels, rows in self._taken)

    def left_out(self) -> dict[str, int]:
        over = sum(self._rows_by_split.values()) - self.num_images()
        return self._others | ({"over the limit": over} if over else {})

    def rows_by_split(self) -> dict[str, int]:
        """Rows in the files, whatever the limit, by the split that they or their file's name say."""
        return dict(self._rows_by_split)

    def images(self, done: IdSet = NONE, /, *, retry_seconds: float = RETRY_SECONDS) -> PieceSource:
        pieces = []
        for file, labels, rows in self._taken:
            for whole in slices(file, labels, rows):
                part = whole.without(done)
                taken = len(part.labels.taken(range(len(part.rows))))
                if taken:
                    read = partial(part.read, retry_seconds)
                    pieces.append(Piece(read, taken, file.size * taken // file.rows))
        return PieceSource("Parquet", pieces)

    def captions(self) -> Iterator[pa.RecordBatch]:
        for file, labels, rows in self._taken:
            columns = file.columns.captions
            if not columns:
                for start in range(0, rows, _ROWS_PER_BATCH):
                    empty: list[dict[str, Any]] = [{}] * min(_ROWS_PER_BATCH, rows - start)
                    yield _caption_rows(labels, start, empty, ())
                continue
            if not rows:
                continue
            row = 0
            try:
                with storage.open_input(file.uri) as handle:
                    for batch in pq.ParquetFile(handle).iter_batches(columns=list(columns)):
                        values = batch.slice(0, rows - row).to_pylist()
                        yield _caption_rows(labels, row, values, columns)
                        row += len(values)
                        if row == rows:
                            break
            except (pa.ArrowException, StoreError, OSError) as error:
                raise SourceError(
                    f"{file.uri}: captions cannot be read: {one_line(error)}"
                ) from error

    def _take_files(self) -> Iterator[tuple[InspectedFile, Labels, int]]:
        """Each file with its labels and the number of rows read from its beginning; splits by file name."""
        numbered: dict[Split | None, int] = {}
        for file in self._files:
            named = split_in_name(file.path)
            first = numbered.get(named, 0)
            numbered[named] = first + file.rows
            left = file.rows if self.options.limit is None else max(0, self.options.limit - first)
            labels = Labels(named or "image", first, named or self._other)
            yield file, labels, min(file.rows, left)
        self._rows_by_split = {split or "no split": rows for split, rows in numbered.items()}

    def _take_rows(self) -> Iterator[tuple[InspectedFile, Labels, int]]:
        """The same; splits by the rows' own column."""
        counts: dict[str, int] = {}
        first = 0
        with ThreadPoolExecutor(16) as pool:
            columns = list(pool.map(read_splits, self._files))
        for file, column in zip(self._files, columns, strict=True):
            otherwise = split_in_name(file.path) or self._other
            labels = Labels("image", first, otherwise)
            taken: list[Split | None] = []
            for row, named in enumerate(column):
                split = named or otherwise or hashed_split(labels.image_id(row))
                counts[split] = counts.get(split, 0) + 1
                over = self.options.limit is not None and counts[split] > self.options.limit
                taken.append(None if over else split)
            first += file.rows
            while taken and taken[-1] is None:
                taken.pop()
            yield file, Labels(labels.prefix, labels.first, otherwise, tuple(taken)), len(taken)
        self._rows_by_split = counts


def _caption_rows(
    labels: Labels,
    first: int,
    rows: list[dict[str, Any]],
    columns: tuple[str, ...],
) -> pa.RecordBatch:
    """Captions of consecutive rows, each a dictionary with the columns of captions: text or lists of it."""
    found: list[tuple[str, str, str | None, int | None]] = []
    for row in labels.taken(range(first, first + len(rows))):
        values: list[str | None] = []
        for name in columns:
            value = rows[row - first][name]
            values += value if isinstance(value, list) else [value]
        texts = [text for text in values if text and text.strip()]
        head = (labels.image_id(row), str(labels.split_of(row)))
        found += [(*head, text, index) for index, text in enumerate(texts)] or [(*head, None, None)]
    columns_of = zip(*found, strict=True) if found else [[]] * len(CAPTION_ROWS)
    arrays = [
        pa.array(list(values), field.type)
        for values, field in zip(columns_of, CAPTION_ROWS, strict=True)
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=CAPTION_ROWS)
