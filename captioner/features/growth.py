"""A collection that grows: what of a source is to be done, and which rows of older parts still count.

A published collection is never changed. One that extends it lists the older parts' files beside its own, and names the
rows that no longer count in ``removed.parquet``.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from captioner import storage
from captioner.artifacts.collection import Tables
from captioner.artifacts.id_set import IdRows, IdSet, content_key
from captioner.artifacts.manifests import FileEntry, Part
from captioner.artifacts.output import Output
from captioner.artifacts.tables import RETRYABLE, UNCHANGED
from captioner.errors import SourceError
from captioner.features.row_marks import FAILED, OUTCOME, Rows
from captioner.sources.base import Source
from captioner.sources.growing import Remaining

logger = logging.getLogger(__name__)

# More of a source than that does not go by itself: a disk that is not mounted looks like an empty one.
_GONE = 0.05
# What is compared of an older row, and what looking at its content takes.
_OLD = pa.schema(
    [
        pa.field("image_id", pa.string()),
        pa.field("size", pa.int64()),
        pa.field("mtime", pa.timestamp("ns", "UTC")),
        pa.field("error_kind", pa.string()),
    ]
)
_CONTENT = pa.schema([_OLD.field("image_id"), pa.field("sha256", pa.string())])


def _looked_at(base: Tables, entries: Sequence[FileEntry]) -> Iterator[pa.Table]:
    """Rows of ``_OLD`` of images that were looked at and were as before, a table a file: they say when that was."""
    for entry in entries:
        if entry.path in base.removed:
            table = base.read(entry, _OLD)
            yield table.filter(pc.equal(table["error_kind"], UNCHANGED))


@dataclass(frozen=True)
class Growth:
    """How a collection becomes what its source is today."""

    base: Tables
    source: Source
    """The images that are to be read."""
    kept: IdSet
    """Those of the source that are not even looked at."""
    unchanged: IdSet | None
    """``content_key`` of what is to be read again; None where nothing is."""

    @property
    def identity(self) -> dict[str, Any]:
        """What a run that extends says of what it extends."""
        content = self.base.manifest.model_dump_json().encode()
        return {"extends": self.base.uri, "extended": hashlib.sha256(content).hexdigest()}

    def finish(self, rows: Rows, output: Output) -> tuple[Rows, dict[str, Part], dict[str, int]]:
        """
        Args:
            rows: what was written, a row for each image of ``source``.

        Returns:
            the rows of the whole collection, its sources, and what all of these left out.

        Raises:
            StoreError: a file of an older part is missing or damaged.
        """
        key = self.source.identity().key
        gone = {path: [*ids] for path, ids in rows.repeated.items()}
        again: list[list[str]] = []
        for entry in rows.files if self.unchanged is not None else ():
            place = output.uri(entry.path)
            with storage.reading(place), storage.open_input(place) as handle:
                table = pq.read_table(handle, columns=OUTCOME.names)
            table = table.filter(pc.equal(table["error_kind"], UNCHANGED))
            again.append(table["image_id"].to_pylist())
            known = {*gone.get(entry.path, ())}
            gone.setdefault(entry.path, []).extend(n for n in again[-1] if n not in known)
        standing = self.kept | IdSet(again)
        older: list[FileEntry] = []
        good = rows.good
        kinds = pc.fill_null(rows.failed["error_kind"], "")
        failed = [rows.failed.filter(pc.not_equal(kinds, UNCHANGED))]
        for entry in self.base.entries():
            (table,) = self.base.rows([entry], FAILED)
            ids = table["image_id"].to_pylist()
            over = np.zeros(len(ids), bool) if entry.part != key else ~standing.holds(ids)
            if len(ids) and over.all():
                continue  # no row of it counts
            before = self.base.removed.get(entry.path)
            gone[entry.path] = [] if before is None else before.to_pylist()
            gone[entry.path] += [name for name, one in zip(ids, over, strict=True) if one]
            table = table.filter(pa.array(~over))
            fine = table["error"].is_null()
            good |= IdSet([table.filter(fine)["image_id"].to_pylist()])
            failed.append(table.filter(pc.invert(fine)))
            older.append(entry)
        new = [entry.model_copy(update={"part": key}) for entry in rows.files]
        gone = {path: ids for path, ids in gone.items() if ids}
        parts = self._parts()
        left_out: Counter[str] = Counter()
        for part in parts.values():
            left_out.update(part.left_out)
        return Rows(good, pa.concat_tables(failed), [*older, *new], gone), parts, dict(left_out)

    def captions(self, new: list[FileEntry]) -> list[FileEntry]:
        """The files of captions of a store: those of the source are all new, and others stay."""
        key = self.source.identity().key
        older = [entry for entry in self.base.entries("captions") if entry.part != key]
        return [*older, *(entry.model_copy(update={"part": key}) for entry in new)]

    def _parts(self) -> dict[str, Part]:
        manifest, identity = self.base.manifest, self.source.identity()
        before = manifest.parts or {
            manifest.source.key: Part(source=manifest.source, left_out=manifest.counts.left_out)
        }
        return before | {identity.key: Part(source=identity, left_out=self.source.left_out())}


def plan_growth(base: Tables, source: Source, *, look_at_all: bool, accept_gone: bool) -> Growth:
    """Compare a source with what a collection has of it.

    Images whose size and time are what they were are kept; others of the same id are read, and done again if their
    content is another. What could not be read is tried again, what is gone no longer counts.

    Args:
        look_at_all: read images whose size and time are what they were, too.
        accept_gone: let more than a twentieth of the source's images go.

    Raises:
        SourceError: that many are gone, or an id is another source's.
        StoreError: a file of the collection is missing or damaged.
    """
    key = source.identity().key
    entries = base.entries(base.directory)
    ours = [entry for entry in entries if entry.part == key]
    foreign = IdSet(
        table["image_id"].to_pylist()
        for table in base.rows(
            [e for e in entries if e.part != key], pa.schema([_OLD.field("image_id")])
        )
    )
    old = _OldRows.read(base.rows(ours, _OLD))
    for table in _looked_at(base, ours):
        old.update(table)
    seen = np.zeros(len(old.size), bool)
    kept: list[IdSet] = []
    again: list[list[str]] = []
    left = 0
    for batch in source.states():
        names = batch["image_id"].to_pylist()
        if (clash := foreign.holds(names)).any():
            raise SourceError(
                f"{names[int(clash.argmax())]} is an image of another source of {base.uri}, too: tell them apart by "
                "--source-options.id-prefix"
            )
        rows = old.find(names)
        there = rows >= 0
        seen[rows[there]] = True
        tried = there & ~old.retry[rows]
        same = tried & old.equals(batch, rows) & (not look_at_all)
        chosen = pa.array(names)
        kept.append(IdSet([chosen.filter(pa.array(same)).to_pylist()]))
        again.append(chosen.filter(pa.array(tried & ~same)).to_pylist())
        left += len(names) - int(same.sum())
    gone = int((~seen).sum())
    if gone > _GONE * len(seen) and not accept_gone:
        raise SourceError(
            f"{gone:,} of {len(seen):,} images of {source.identity().uri} that {base.uri} has are gone: --accept-gone "
            "lets them go"
        )
    looked = IdSet(again)
    unchanged = None
    if len(looked):
        tables = base.rows(ours, _CONTENT)
        unchanged = IdSet(_content_keys(table, looked) for table in tables)
    every = IdSet()
    for part in kept:
        every = every | part
    logger.info(
        "extending %s: %s images are as they were, %s are new or to be looked at, %s are gone",
        base.uri, f"{len(every):,}", f"{left:,}", f"{gone:,}",
    )  # fmt: skip
    return Growth(base, Remaining(source, every, left), every, unchanged)


def _content_keys(table: pa.Table, looked: IdSet) -> list[str]:
    names = table["image_id"].to_pylist()
    wanted = looked.holds(names)
    return [
        content_key(name, digest)
        for name, digest, one in zip(names, table["sha256"].to_pylist(), wanted, strict=True)
        if one and digest is not None
    ]


@dataclass(frozen=True)
class _OldRows:
    """What a collection has of a source, in the order of its files."""

    find: Any
    size: np.ndarray[Any, np.dtype[np.int64]]
    """-1 where nothing was said."""
    mtime: np.ndarray[Any, np.dtype[np.int64]]
    retry: np.ndarray[Any, np.dtype[np.bool_]]
    """False behind the last one, too, for rows that are not there."""

    @classmethod
    def read(cls, tables: Iterator[pa.Table]) -> "_OldRows":
        sizes, times, retries = (
            [np.zeros(0, np.int64)],
            [np.zeros(0, np.int64)],
            [np.zeros(0, bool)],
        )

        def names() -> Iterator[list[str]]:
            for table in tables:
                sizes.append(_numbers(table["size"]))
                times.append(_numbers(table["mtime"]))
                kinds = pc.fill_null(table["error_kind"], "")
                retries.append(pc.equal(kinds, RETRYABLE).to_numpy())
                yield table["image_id"].to_pylist()

        rows = IdRows(names())
        nothing = np.zeros(1, np.int64)
        return cls(
            rows.find,
            np.concatenate(sizes),
            np.concatenate(times),
            np.concatenate([*retries, nothing.astype(bool)]),
        )

    def update(self, table: pa.Table) -> None:
        """Take what is said of some images in the place of what was."""
        rows = self.find(table["image_id"].to_pylist())
        there = rows >= 0
        self.size[rows[there]] = _numbers(table["size"])[there]
        self.mtime[rows[there]] = _numbers(table["mtime"])[there]

    def equals(self, batch: pa.RecordBatch, rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Whether what is said of images today is what these rows say, bool [N]; what is not said does not matter."""
        if not len(self.size):
            return np.zeros(len(rows), bool)
        equal = np.ones(len(rows), bool)
        for name, old in (("size", self.size), ("mtime", self.mtime)):
            now = _numbers(batch[name])
            equal &= (now < 0) | (now == old[rows])
        return equal


def _numbers(column: pa.Array | pa.ChunkedArray) -> np.ndarray[Any, np.dtype[np.int64]]:
    found: np.ndarray[Any, np.dtype[np.int64]] = pc.fill_null(
        column.cast(pa.int64()), -1
    ).to_numpy()
    return found
