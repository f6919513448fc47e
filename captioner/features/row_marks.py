"""What a pipeline run has done so far, by Ray Data's checkpoint marks, and whether its rows add up at the end."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from captioner import storage
from captioner.artifacts.id_set import IdSet
from captioner.artifacts.manifests import Counts, FileEntry
from captioner.artifacts.output import Output
from captioner.artifacts.tables import RETRYABLE
from captioner.errors import SourceError, StoreError
from captioner.runtime.ray_private import PENDING

CHECKPOINT = "marks"
_READERS = 16
_OUTCOME = pa.schema(
    [("image_id", pa.string()), ("error", pa.string()), ("error_kind", pa.string())]
)


@dataclass(frozen=True)
class Rows:
    """The rows of a finished run, one for each image."""

    good: IdSet
    failed: pa.Table
    """image_id, error and error_kind of the others."""

    def __len__(self) -> int:
        return len(self.good) + len(self.failed)


def finish_rows(output: Output, directory: str, total: int, max_reject_fraction: float) -> Rows:
    """Check that every image has exactly one row, and that few enough were rejected.

    Raises:
        StoreError: rows are missing or repeated.
        SourceError: more than ``max_reject_fraction`` of the images were rejected.
    """
    files = _parquet_files(output.uri(directory))
    failed: list[pa.Table] = []

    def good_ids() -> Iterator[list[str]]:
        for table in _read(files, _OUTCOME):
            bad = table["error"].is_valid()
            failed.append(table.filter(bad))
            yield table.filter(pc.invert(bad))["image_id"].to_pylist()

    good = IdSet(good_ids())
    rows = Rows(good, pa.concat_tables([_OUTCOME.empty_table(), *failed]))
    bad_ids = rows.failed["image_id"].to_pylist()
    unique = len(good) + len(set(bad_ids)) - int(good.holds(list(set(bad_ids))).sum())
    written = len(rows) + good.repeated
    if not written == unique == total:
        raise StoreError(
            f"{output.root}: {total} images in the source, {written} rows of {unique} images written; "
            "did the source change, or another run write here? Extract to a new directory"
        )
    if len(rows.failed) > max_reject_fraction * total:
        first = rows.failed.slice(0, 1).to_pylist()[0]
        raise SourceError(
            f"{len(rows.failed)} of {total} images were rejected, more than max-reject-fraction "
            f"{max_reject_fraction}; the first: {first['image_id']}: {first['error']}"
        )
    return rows


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


def list_data_files(output: Output, directory: str) -> list[FileEntry]:
    """The Parquet files of a subdirectory with their sizes and row counts, for the manifest."""
    files = _parquet_files(output.uri(directory))
    return [
        FileEntry(path=f"{directory}/{file.path}", bytes=file.size, rows=rows)
        for file, rows in zip(files, _count_rows(files), strict=True)
    ]


def discard_pending(output: Output, directory: str) -> None:
    """Delete the files in ``directory`` that a killed task left half-done, then their marks: their rows are done again.

    The marks of such a file are pending, or both pending and final: a run leaves both when it is killed inside a
    rename, on S3 a copy and a delete, or while a lost task is repeated.
    """
    marks = [file.path for file in storage.list_files(output.work(CHECKPOINT))]
    pending = [mark for mark in marks if mark.endswith(PENDING)]
    if not pending:
        return
    filesystem, path = storage.resolve(output.work(CHECKPOINT))
    _, data = storage.resolve(output.uri(directory))
    # Ray Data names a file after its mark, with a number behind.
    begins = tuple(mark.removesuffix(PENDING) for mark in pending)
    for file in storage.list_files(output.uri(directory)):
        if file.path.startswith(begins):
            filesystem.delete_file(f"{data}/{file.path}")
    there = set(marks)
    for mark in pending:
        if (final := mark.removesuffix(PENDING) + ".parquet") in there:
            filesystem.delete_file(f"{path}/{final}")
        filesystem.delete_file(f"{path}/{mark}")


def finished(output: Output) -> IdSet:
    """The images whose output files are complete."""
    tables = _read(_final_marks(output), pa.schema([_OUTCOME.field("image_id")]))
    return IdSet(table["image_id"].to_pylist() for table in tables)


def count_done(output: Output) -> int:
    """Images whose output files are complete."""
    return sum(_count_rows(_final_marks(output)))


def _final_marks(output: Output) -> list[storage.FileInfo]:
    marks = _parquet_files(output.work(CHECKPOINT))
    return [mark for mark in marks if not mark.path.endswith(PENDING)]


def _read(files: list[storage.FileInfo], schema: pa.Schema) -> Iterator[pa.Table]:
    """Columns of files, a table each, in their order."""

    def read(file: storage.FileInfo) -> pa.Table:
        with storage.open_input(file.uri) as handle:
            return pq.read_table(handle, columns=schema.names).cast(schema)

    # On an object store each is a round trip or two. A group at a time, or all would be held at once.
    with ThreadPoolExecutor(_READERS) as threads:
        for start in range(0, len(files), _READERS):
            yield from threads.map(read, files[start : start + _READERS])


def _parquet_files(uri: str) -> list[storage.FileInfo]:
    return [file for file in storage.list_files(uri) if file.path.endswith(".parquet")]


def _count_rows(files: list[storage.FileInfo]) -> list[int]:
    def count(file: storage.FileInfo) -> int:
        with storage.open_input(file.uri) as handle:
            rows: int = pq.ParquetFile(handle).metadata.num_rows
        return rows

    # On an object store each is a round trip or two.
    with ThreadPoolExecutor(_READERS) as threads:
        return list(threads.map(count, files))
