"""What a pipeline run has done so far, by Ray Data's checkpoint marks, and whether its rows add up at the end."""

from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq

from captioner import storage
from captioner.artifacts.output import Output
from captioner.artifacts.schema import FileEntry
from captioner.errors import SourceError, StoreError

CHECKPOINT = "_checkpoint"
_PENDING = ".pending.parquet"


def finish_rows(output: Output, directory: str, total: int, max_reject_fraction: float) -> pa.Table:
    """Check that every image has exactly one row, and that few enough were rejected.

    Returns:
        image_id, split and error of all rows, as far as they have them.

    Raises:
        StoreError: rows are missing or repeated.
        SourceError: more than ``max_reject_fraction`` of the images were rejected.
    """
    filesystem, path = storage.resolve(output.uri(directory))
    names = [file.path for file in _parquet_files(output, directory)]
    dataset = pads.dataset(
        [f"{path}/{name}" for name in names], filesystem=filesystem, format="parquet"
    )
    there = [name for name in ("image_id", "split", "error") if name in dataset.schema.names]
    rows = dataset.to_table(columns=there)
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


def list_data_files(output: Output, directory: str) -> list[FileEntry]:
    """The Parquet files of a subdirectory with their row counts, for the manifest."""
    files = _parquet_files(output, directory)
    return [
        FileEntry(path=f"{directory}/{file.path}", rows=rows)
        for file, rows in zip(files, _count_rows(files), strict=True)
    ]


def forget_checkpoint(output: Output) -> None:
    """Delete the bookkeeping of a run. Only after publishing: without it a restart would repeat every row."""
    filesystem, path = storage.resolve(output.uri(CHECKPOINT))
    if storage.exists(output.uri(CHECKPOINT)):
        filesystem.delete_dir(path)


def distrust_double_marks(output: Output) -> None:
    """Of files that are marked both pending and complete, keep the pending mark: their rows are then done again.

    A run leaves both when it is killed inside a rename, on S3 a copy and a delete, or while a lost task is repeated.
    Ray Data would delete such a file and yet believe that its rows are done.
    """
    marks = {file.path for file in storage.list_files(output.uri(CHECKPOINT))}
    filesystem, path = storage.resolve(output.uri(CHECKPOINT))
    for mark in marks:
        if mark.endswith(_PENDING) and (final := mark.removesuffix(_PENDING) + ".parquet") in marks:
            filesystem.delete_file(f"{path}/{final}")


def has_pending(output: Output) -> bool:
    """Whether a killed task may have left a file that Ray Data has yet to delete."""
    return any(file.path.endswith(_PENDING) for file in storage.list_files(output.uri(CHECKPOINT)))


def count_done(output: Output) -> int:
    """Images whose output files are complete."""
    done = [mark for mark in _parquet_files(output, CHECKPOINT) if not mark.path.endswith(_PENDING)]
    return sum(_count_rows(done))


def _parquet_files(output: Output, directory: str) -> list[storage.FileInfo]:
    files = storage.list_files(output.uri(directory))
    return [file for file in files if file.path.endswith(".parquet")]


def _count_rows(files: list[storage.FileInfo]) -> list[int]:
    def count(file: storage.FileInfo) -> int:
        with storage.open_input(file.uri) as handle:
            rows: int = pq.ParquetFile(handle).metadata.num_rows
        return rows

    # On an object store each is a round trip or two.
    with ThreadPoolExecutor(16) as threads:
        return list(threads.map(count, files))
