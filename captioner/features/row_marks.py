"""What a pipeline run has done so far, by Ray Data's checkpoint marks, and whether its rows add up at the end."""

from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq

from captioner import storage
from captioner.artifacts.manifests import Counts, FileEntry
from captioner.artifacts.output import Output
from captioner.artifacts.tables import RETRYABLE
from captioner.errors import SourceError, StoreError
from captioner.runtime.ray_private import PENDING

CHECKPOINT = "marks"


def finish_rows(output: Output, directory: str, total: int, max_reject_fraction: float) -> pa.Table:
    """Check that every image has exactly one row, and that few enough were rejected.

    Returns:
        image_id, error and error_kind of all rows.

    Raises:
        StoreError: rows are missing or repeated.
        SourceError: more than ``max_reject_fraction`` of the images were rejected.
    """
    filesystem, path = storage.resolve(output.uri(directory))
    names = [file.path for file in _parquet_files(output.uri(directory))]
    dataset = pads.dataset(
        [f"{path}/{name}" for name in names], filesystem=filesystem, format="parquet"
    )
    rows = dataset.to_table(columns=["image_id", "error", "error_kind"])
    unique = pa.compute.count_distinct(rows["image_id"]).as_py()
    if not len(rows) == unique == total:
        raise StoreError(
            f"{output.root}: {total} images in the source, {len(rows)} rows of {unique} images written; "
            "did the source change, or another run write here? Extract to a new directory"
        )
    rejected = rows.filter(rows["error"].is_valid())
    if len(rejected) > max_reject_fraction * total:
        first = rejected.slice(0, 1).to_pylist()[0]
        raise SourceError(
            f"{len(rejected)} of {total} images were rejected, more than max-reject-fraction "
            f"{max_reject_fraction}; the first: {first['image_id']}: {first['error']}"
        )
    return rows


def count_rows(rows: pa.Table, left_out: dict[str, int]) -> Counts:
    """What became of every file found.

    Args:
        rows: from ``finish_rows``.
        left_out: files that the source did not take, by kind.
    """
    failed = rows.filter(rows["error"].is_valid())
    unreadable = pa.compute.sum(pa.compute.equal(failed["error_kind"], RETRYABLE)).as_py() or 0
    return Counts(
        ok=len(rows) - len(failed),
        rejected=len(failed) - unreadable,
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


def distrust_double_marks(output: Output) -> None:
    """Of files that are marked both pending and complete, keep the pending mark: their rows are then done again.

    A run leaves both when it is killed inside a rename, on S3 a copy and a delete, or while a lost task is repeated.
    Ray Data would delete such a file and yet believe that its rows are done.
    """
    marks = {file.path for file in storage.list_files(output.work(CHECKPOINT))}
    filesystem, path = storage.resolve(output.work(CHECKPOINT))
    for mark in marks:
        if mark.endswith(PENDING) and (final := mark.removesuffix(PENDING) + ".parquet") in marks:
            filesystem.delete_file(f"{path}/{final}")


def has_pending(output: Output) -> bool:
    """Whether a killed task may have left a file that Ray Data has yet to delete."""
    return any(file.path.endswith(PENDING) for file in storage.list_files(output.work(CHECKPOINT)))


def count_done(output: Output) -> int:
    """Images whose output files are complete."""
    done = [
        mark for mark in _parquet_files(output.work(CHECKPOINT)) if not mark.path.endswith(PENDING)
    ]
    return sum(_count_rows(done))


def _parquet_files(uri: str) -> list[storage.FileInfo]:
    return [file for file in storage.list_files(uri) if file.path.endswith(".parquet")]


def _count_rows(files: list[storage.FileInfo]) -> list[int]:
    def count(file: storage.FileInfo) -> int:
        with storage.open_input(file.uri) as handle:
            rows: int = pq.ParquetFile(handle).metadata.num_rows
        return rows

    # On an object store each is a round trip or two.
    with ThreadPoolExecutor(16) as threads:
        return list(threads.map(count, files))
