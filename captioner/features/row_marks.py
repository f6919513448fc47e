"""What a pipeline run has done so far, by Ray Data's checkpoint marks, and whether its rows add up at the end."""

import io
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from captioner import storage
from captioner.artifacts.id_set import IdSet
from captioner.artifacts.manifests import Counts, FileEntry
from captioner.artifacts.output import Output
from captioner.artifacts.tables import RETRYABLE
from captioner.errors import OutOfReachError, StoreError
from captioner.runtime.ray_private import PENDING

CHECKPOINT = "marks"
_READERS = 16
# Of a file that was written again without the rows that do not count.
_ONCE = ".once.parquet"
OUTCOME = pa.schema(
    [("image_id", pa.string()), ("error", pa.string()), ("error_kind", pa.string())]
)
_URI = pa.schema([("uri", pa.string())])
# Of an image without a result.
FAILED = OUTCOME.insert(1, _URI.field(0))


@dataclass(frozen=True)
class Rows:
    """The rows of a finished run, one for each image."""

    good: IdSet
    failed: pa.Table
    """image_id, uri, error and error_kind of the others."""
    files: list[FileEntry]
    """Where they are."""
    repeated: dict[str, list[str]]
    """By file, ids of images whose row is taken from another one."""

    def __len__(self) -> int:
        return len(self.good) + len(self.failed)


def finish_rows(output: Output, directory: str, total: int) -> Rows:
    """Find every image's row.

    Two runs on one output may have written an image each: a row without an error counts before one with it, then that
    in the first file. Files that are not whole do not count.

    Raises:
        StoreError: there are more images than in the source.
        OutOfReachError: rows are missing; the same command makes them.
    """
    found = _parquet_files(output.uri(directory))
    counts = dict(zip(found, _count_rows(found), strict=True))
    files = [file for file in found if counts[file] is not None]
    good, failed = _outcomes(files, {})
    repeated: dict[str, list[str]] = {}
    bad_ids = failed["image_id"].to_pylist()
    if good.repeated or len(set(bad_ids)) < len(bad_ids) or good.holds(bad_ids).any():
        repeated = _find_repeated(files)
        good, failed = _outcomes(files, repeated)
    entries = [
        FileEntry(path=f"{directory}/{file.path}", bytes=file.size, rows=counts[file])
        for file in files
    ]
    rows = Rows(
        good, failed, entries, {f"{directory}/{path}": ids for path, ids in repeated.items()}
    )
    if len(rows) > total:
        raise StoreError(
            f"{output.root}: {total} images in the source, {len(rows)} written; did the source change? "
            "Choose a new directory"
        )
    if len(rows) < total:
        raise OutOfReachError(
            f"{output.root}: the rows of {total - len(rows)} of {total} images are lost; the same command makes them"
        )
    return rows


def _outcomes(
    files: list[storage.FileInfo], without: Mapping[str, list[str]]
) -> tuple[IdSet, pa.Table]:
    """Ids of the good rows, and the others."""
    failed = [FAILED.empty_table()]

    def good_ids() -> Iterator[list[str]]:
        for file, table in zip(files, _read(files, OUTCOME), strict=True):
            has_failed = pc.any(table["error"].is_valid()).as_py()
            if has_failed:
                (uris,) = _read([file], _URI)
                table = table.add_column(1, _URI.field(0), uris["uri"])
            if ids := without.get(file.path):
                table = table.filter(pc.invert(pc.is_in(table["image_id"], pa.array(ids))))
            bad = table["error"].is_valid()
            if has_failed:
                failed.append(table.filter(bad))
            yield table.filter(pc.invert(bad))["image_id"].to_pylist()

    good = IdSet(good_ids())
    return good, pa.concat_tables(failed)


def _find_repeated(files: list[storage.FileInfo]) -> dict[str, list[str]]:
    """By file, ids whose row counts in another one."""
    again = IdSet(table["image_id"].to_pylist() for table in _read(files, OUTCOME)).came_again()
    seen: list[tuple[str, bool, int]] = []
    for number, table in enumerate(_read(files, OUTCOME)):
        ids, bad = table["image_id"].to_pylist(), table["error"].is_valid().to_pylist()
        seen += [(ids[row], bad[row], number) for row in np.flatnonzero(again.holds(ids))]
    repeated: dict[str, list[str]] = {}
    kept: tuple[str, bool, int] | None = None
    for one in sorted(seen):
        if kept is None or one[0] != kept[0]:
            kept = one
            continue
        if one[2] == kept[2]:
            raise StoreError(f"{files[one[2]].uri} holds {one[0]} twice: choose a new directory")
        repeated.setdefault(files[one[2]].path, []).append(one[0])
    return repeated


def count_rows(rows: Rows, left_out: dict[str, int]) -> Counts:
    """What became of every file found.

    Args:
        left_out: files that the source did not take, by kind.
    """
    unreadable = pc.sum(pc.equal(rows.failed["error_kind"], RETRYABLE)).as_py() or 0
    return Counts(
        ok=len(rows.good),
        rejected=len(rows.failed) - unreadable,
        unreadable=unreadable,
        left_out=left_out,
    )


def write_removed(output: Output, rows: Rows) -> FileEntry | None:
    """The table (file, image_id) of rows that do not count; None where all do."""
    if not rows.repeated:
        return None
    pairs = [(file, one) for file, ids in sorted(rows.repeated.items()) for one in ids]
    table = pa.table(
        dict(zip(("file", "image_id"), map(list, zip(*pairs, strict=True)), strict=True))
    )
    return _write(output, "removed.parquet", table)


def rewrite_repeated(output: Output, rows: Rows) -> list[FileEntry]:
    """The files without rows that do not count: for tables that are read by anything that reads Parquet."""
    entries = []
    for entry in rows.files:
        if ids := rows.repeated.get(entry.path):
            place = output.uri(entry.path)
            with storage.reading(place), storage.open_input(place) as handle:
                table = pq.read_table(handle)
            table = table.filter(pc.invert(pc.is_in(table["image_id"], pa.array(ids))))
            # Not in its place: were this run killed, its mark would seem to be of another file.
            entry = _write(output, entry.path.removesuffix(".parquet") + _ONCE, table)
        if entry.rows:
            entries.append(entry)
    return entries


def _write(output: Output, path: str, table: pa.Table) -> FileEntry:
    data = io.BytesIO()
    pq.write_table(table, data, write_page_checksum=True)
    return output.write(path, data.getvalue()).model_copy(update={"rows": len(table)})


def discard_unfinished(output: Output, directory: str) -> None:
    """Delete the files in ``directory`` that are not whole, then their marks: their rows are done again.

    A killed task leaves a pending mark, or a pending and a final one where it is killed inside a rename, on S3 a copy
    and a delete. A power cut may leave empty files behind a final mark, and another run on the same output none.
    """
    marks = storage.list_files(output.work(CHECKPOINT))
    if not marks:
        return
    pending = {mark.path.removesuffix(PENDING) for mark in marks if mark.path.endswith(PENDING)}
    final = [
        mark for mark in _final_marks(output) if mark.path.removesuffix(".parquet") not in pending
    ]
    files = storage.list_files(output.uri(directory))
    whole = _parquet_files(output.uri(directory))
    written: Counter[str] = Counter()
    lost = set()
    for file, rows in zip(whole, _count_rows(whole), strict=True):
        # Ray Data names a file after its mark, with a number behind.
        stem = file.path.removesuffix(".parquet").rpartition("-")[0]
        if rows is None:
            lost.add(stem)
        else:
            written[stem] += rows
    for mark, rows in zip(final, _count_rows(final), strict=True):
        stem = mark.path.removesuffix(".parquet")
        if rows is None or rows != written[stem]:
            lost.add(stem)
    discarded = tuple(f"{stem}{end}" for stem in pending | lost for end in ("-", "."))
    for file in files:
        if file.path.startswith(discarded):
            storage.delete(file.uri)
    for mark in marks:
        if mark.path.startswith(discarded):
            storage.delete(mark.uri)


def finished(output: Output) -> IdSet:
    """The images whose output files are complete."""
    tables = _read(_final_marks(output), pa.schema([OUTCOME.field("image_id")]))
    return IdSet(table["image_id"].to_pylist() for table in tables)


def count_done(output: Output) -> int:
    """Images whose output files are complete."""
    return sum(rows or 0 for rows in _count_rows(_final_marks(output)))


def _final_marks(output: Output) -> list[storage.FileInfo]:
    marks = _parquet_files(output.work(CHECKPOINT))
    return [mark for mark in marks if not mark.path.endswith(PENDING)]


def _read(files: list[storage.FileInfo], schema: pa.Schema) -> Iterator[pa.Table]:
    """Columns of files, a table each, in their order."""

    def read(file: storage.FileInfo) -> pa.Table:
        try:
            with storage.reading(file.uri), storage.open_input(file.uri) as handle:
                return pq.read_table(
                    handle, columns=schema.names, page_checksum_verification=True
                ).cast(schema)
        except storage.DamagedError as error:
            raise StoreError(
                f"{error}: delete it, and the same command does again what it held"
            ) from error

    # On an object store each is a round trip or two. A group at a time, or all would be held at once.
    with ThreadPoolExecutor(_READERS) as threads:
        for start in range(0, len(files), _READERS):
            yield from threads.map(read, files[start : start + _READERS])


def _parquet_files(uri: str) -> list[storage.FileInfo]:
    files = storage.list_files(uri)
    return [f for f in files if f.path.endswith(".parquet") and not f.path.endswith(_ONCE)]


def _count_rows(files: list[storage.FileInfo]) -> list[int | None]:
    """None for a file that is not whole."""

    def count(file: storage.FileInfo) -> int | None:
        try:
            with storage.reading(file.uri), storage.open_input(file.uri) as handle:
                rows: int = pq.ParquetFile(handle).metadata.num_rows
        except storage.DamagedError:
            return None
        return rows

    # On an object store each is a round trip or two.
    with ThreadPoolExecutor(_READERS) as threads:
        return list(threads.map(count, files))
