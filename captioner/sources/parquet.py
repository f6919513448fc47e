"""Parquet files in the schema of the Hugging Face hub: an ``image`` column, captions beside it or none."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from captioner import storage
from captioner.artifacts.id_set import NONE, IdSet
from captioner.artifacts.manifests import SourceIdentity
from captioner.artifacts.tables import CAPTION_ROWS
from captioner.config import SourceConfig, Split
from captioner.errors import SourceError
from captioner.sources.base import Listed
from captioner.sources.columns import NO_CAPTIONS, texts_of
from captioner.sources.image_files import is_image
from captioner.sources.outage import RETRY_SECONDS, TABLE_ERRORS, told_of
from captioner.sources.parquet_files import (
    InspectedFile,
    holds_images,
    is_parquet,
    names_images,
    open_files,
    read_column,
)
from captioner.sources.parquet_rows import Labels, slices
from captioner.sources.place import Place, suffix_of
from captioner.sources.shard_index import is_shard
from captioner.sources.splits import split_in_name, splits_called
from captioner.sources.tasks import Piece, PieceSource, states

_ROWS_PER_BATCH = 10_000
OPTIONS = frozenset(
    (
        "captions",
        "image_column",
        "caption_columns",
        "split_column",
        "id_column",
        "partial",
        "exclude",
        "split",
        "limit",
    )
)
"""Settings of ``SourceConfig`` that say something here."""


def open_place(place: Place) -> "ParquetSource | None":
    """Parquet files, or a directory of them and of no images but those that they name.

    Raises:
        SourceError: the directory holds both.
    """
    if place.files is None:
        tables = None
        if not is_parquet(place.uri):
            return None
        named = False
    else:
        tables = place.taken("parquet", is_parquet)
        place.check_unchanged(tables)
        if not tables:
            return None
        image = next((file.path for file in place.files if is_image(file.path)), None)
        others = image is not None or any(is_shard(file.path) for file in place.files)
        if others and not any(map(holds_images, tables)):
            return None  # captions of the images, or what a downloader notes
        named = image is not None and all(map(names_images, tables))
        if image is not None and not named:
            raise SourceError(
                f"{place.spec}: holds both Parquet files ({tables[0].path}, ...) and images "
                f"({image}, ...): give the folder of one kind, or leave one out with source-options.exclude"
            )
    return ParquetSource(
        place.uri,
        tables,
        place.options,
        captions=place.captions,
        others=place.beginning.left_out
        if place.beginning
        else dict(
            Counter(place.left_out)
            + Counter(
                suffix_of(file.path)
                for file in place.files or ()
                if not is_parquet(file.path) and not (named and is_image(file.path))
            )
        ),
    )


class ParquetSource:
    """A Parquet file or a directory of them, split by a ``split`` column or by file name.

    An image's id is its file's path without the suffix and its row in it, ``data/train-00000-of-00003/000123``, which
    no other file's coming or going changes; or what a column of ids says. Rows whose column names no split, and files
    whose name says nothing, have the configured split; by default they train, where others say theirs.
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
            SourceError: a file is unreadable, has no image column, or is missing; ids are null or repeated.
        """
        self.uri = uri
        self.name = name or uri
        self.options = options
        self._others = others or {}
        self._single = files is None
        if options.captions not in (None, NO_CAPTIONS):
            raise SourceError(
                f"source-options.captions: {uri} holds captions in columns: source-options.caption-columns names them"
            )
        self._files = open_files(uri, files, options, captions=captions)
        self._rows_by_split: dict[str, int] = {}
        self._taken = list(self._take(split_column))

    def identity(self) -> SourceIdentity:
        listing = "".join(f"{file.path}:{file.rows}:{file.size};" for file in self._files)
        digest = hashlib.sha256(listing.encode()).hexdigest()
        return SourceIdentity(
            kind="parquet",
            uri=self.name,
            options={"limit": self.options.limit, "id_column": self.options.id_column},
            listing=digest,
            # They lie in the same files.
            captions=f"{self.options.split} {[file.columns for file in self._files[:1]]} {digest}",
        )

    def files(self) -> Iterator[Listed]:
        for file in () if self._single else self._files:
            yield None, storage.FileInfo(file.uri, file.path, file.size, file.mtime)

    def states(self) -> Iterator[pa.RecordBatch]:
        for file, labels, rows in self._taken:
            ids = [labels.image_id(row) for row in labels.taken(range(rows))]
            yield states(ids, [None] * len(ids), [file.mtime] * len(ids))

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
            except TABLE_ERRORS as error:
                raise told_of(f"{file.uri}: captions cannot be read", error) from error

    def _take(self, split_column: bool) -> Iterator[tuple[InspectedFile, Labels, int]]:
        """Each file with its labels, and the number of rows read from its beginning."""
        ids = self._read_columns("id")
        self._check_ids(ids)
        splits = self._read_columns("split" if split_column else None)
        called = splits_called((name for names in splits for name in names or () if name), self.uri)
        by_name = [split_in_name(file.path) for file in self._files]
        other = self.options.split
        if other == "auto":
            if not any(file.columns.captions for file in self._files):
                other = "test"
            elif any(by_name) or any(called.values()):
                other = "train"
        rest: Split | None = None if other == "auto" else other
        counts: Counter[str] = Counter()
        for file, own, named, names in zip(self._files, ids, by_name, splits, strict=True):
            labels = Labels(
                file.stem, 0, named or rest, None, tuple(map(str, own)) if own else None
            )
            limit = self.options.limit
            if names is None and (labels.split is not None or limit is None):
                before = counts[labels.split or "no split"]
                counts[labels.split or "no split"] += file.rows
                yield (
                    file,
                    labels,
                    file.rows if limit is None else min(file.rows, max(0, limit - before)),
                )
                continue
            column: list[Split | None] = []
            for row in range(file.rows):
                name = names[row] if names else None
                split = (called[name] if name else None) or labels.split_of(row)
                assert split is not None
                counts[split] += 1
                over = limit is not None and counts[split] > limit
                column.append(None if over else split)
            while column and column[-1] is None:
                column.pop()
            yield file, replace(labels, column=tuple(column)), len(column)
        self._rows_by_split = dict(counts)

    def _read_columns(self, what: Literal["split", "id"] | None) -> list[list[str | None] | None]:
        """A column of each file; None of files that have none."""

        def read(file: InspectedFile) -> list[str | None] | None:
            name: str | None = getattr(file.columns, what) if what else None
            return None if name is None else read_column(file, name)

        with ThreadPoolExecutor(16) as pool:
            return list(pool.map(read, self._files))

    def _check_ids(self, ids: list[list[str | None] | None]) -> None:
        places: dict[str, str] = {}
        for file, column in zip(self._files, ids, strict=True):
            for row, own in enumerate(column or ()):
                place = f"{file.uri}#{row}"
                if not own:
                    raise SourceError(f"source-options.id-column: {place} has no id")
                if places.setdefault(own, place) != place:
                    raise SourceError(
                        f"source-options.id-column: {places[own]} and {place} have the same id {own!r}"
                    )


def _caption_rows(
    labels: Labels,
    first: int,
    rows: list[dict[str, Any]],
    columns: tuple[str, ...],
) -> pa.RecordBatch:
    """Captions of consecutive rows, each a dictionary with the columns of captions."""
    found: list[tuple[str, str, str | None, int | None]] = []
    for row in labels.taken(range(first, first + len(rows))):
        values = (text for name in columns for text in texts_of(rows[row - first][name]))
        texts = [text for text in values if text.strip()]
        head = (labels.image_id(row), str(labels.split_of(row)))
        found += [(*head, text, index) for index, text in enumerate(texts)] or [(*head, None, None)]
    columns_of = zip(*found, strict=True) if found else [[]] * len(CAPTION_ROWS)
    arrays = [
        pa.array(list(values), field.type)
        for values, field in zip(columns_of, CAPTION_ROWS, strict=True)
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=CAPTION_ROWS)
