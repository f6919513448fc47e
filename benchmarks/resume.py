"""Where extraction's books bend: a killed run of many rows is made up, then continued and published for real.

Nothing is decoded or encoded. Marks, files, Ray Data's filter, the check of the rows and the list of files are
extraction's own, and grow with the number of rows as they would there.
"""

import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.config import BenchmarkResumeConfig
from benchmarks.watch import Watch
from captioner import storage
from captioner.artifacts.output import Output
from captioner.artifacts.schema import Record, SourceIdentity, feature_rows
from captioner.config import ImageLimits
from captioner.features.pipeline import rows_per_file, run_pipeline
from captioner.features.row_marks import CHECKPOINT, finish_rows, list_data_files
from captioner.runtime.cluster import plan_pool, start_ray
from captioner.sources.tasks import Piece, PieceSource, source_rows

logger = logging.getLogger(__name__)

_SCHEMA = feature_rows(1, grid=False)
_ROWS_PER_PIECE = 10_000
_WHY = "dry run"
_Result = TypeVar("_Result")


class ResumeBenchmark(Record):
    """Seconds of each phase, and the memory of the whole."""

    rows: int
    rows_left: int
    """Not done by the made-up run."""
    files: int
    seconds: dict[str, float]
    peak_driver_bytes: int
    peak_worker_bytes: int
    peak_object_store_bytes: int
    manifest_bytes: int
    """Of the list of files alone."""

    def table(self) -> str:
        """For a terminal."""
        rows = [(f"{name}", f"{seconds:,.1f} s") for name, seconds in self.seconds.items()]
        sizes = (
            ("driver, peak", self.peak_driver_bytes),
            ("largest worker, peak", self.peak_worker_bytes),
            ("object store, peak", self.peak_object_store_bytes),
        )
        rows += [(name, f"{size / 2**20:,.0f} MiB") for name, size in sizes]
        rows.append(("files in the manifest", f"{self.manifest_bytes / 2**20:,.2f} MiB"))
        head = f"{self.rows:,} rows, {self.rows_left:,} of them left, in {self.files:,} files"
        return "\n".join([head, *(f"{name:28}{value}" for name, value in rows)])


class IdSource:
    """Images that exist as ids alone: each is a row that says so in ``error``."""

    def __init__(self, rows: int):
        self._rows = rows

    def identity(self) -> SourceIdentity:
        return SourceIdentity(kind="ids", uri="ids", options={"rows": self._rows})

    def num_images(self) -> int:
        return self._rows

    def images(self) -> PieceSource:
        return PieceSource(
            "Ids",
            [
                Piece(partial(_read, first, count), count, count * 100)
                for first, count in _parts(self._rows, _ROWS_PER_PIECE)
            ],
        )

    def captions(self) -> Iterator[pa.RecordBatch]:
        return iter(())


class NoStage:
    """Never called: no row is good."""

    def __call__(self, rows: pa.Table, images: np.ndarray[Any, np.dtype[np.uint8]]) -> pa.Table:
        raise NotImplementedError


def benchmark_resume(config: BenchmarkResumeConfig) -> ResumeBenchmark:
    """Make up a killed run of ``config.rows`` rows in a temporary directory, continue and publish it.

    Raises:
        StoreError: the rows do not add up, which would be a defect.
    """
    start_ray()
    pool = plan_pool(config.left, size=1)
    seconds: dict[str, float] = {}

    def phase(name: str, work: Callable[[], _Result]) -> _Result:
        logger.info(name)
        started = time.perf_counter()
        result = work()
        seconds[name] = time.perf_counter() - started
        return result

    with tempfile.TemporaryDirectory(dir=config.scratch) as folder, Watch() as watch:
        output = Output(f"{folder}/out", {"job": "benchmark"})
        per_file = config.rows_per_file or rows_per_file(
            config.rows, feature_rows(2048, grid=False)
        )
        done = config.rows - min(config.rows, config.left)
        phase("making up a killed run", partial(_make_up, output, done, per_file))
        source = IdSource(config.rows)
        run = partial(
            run_pipeline, source, output, "features", _SCHEMA, NoStage, {},
            limits=ImageLimits(), batch_size=256, pool=pool, counter=watch.counter,
        )  # fmt: skip
        phase("continuing it", run)
        finish = partial(finish_rows, output, "features", config.rows, 1.0)
        phase("checking the rows", finish)
        files = phase("listing the files", partial(list_data_files, output, "features"))
        text = "[" + ",".join(entry.model_dump_json() for entry in files) + "]"
        phase("publishing", partial(output.publish, text))
    return ResumeBenchmark(
        rows=config.rows,
        rows_left=config.rows - done,
        files=len(files),
        seconds=seconds,
        peak_driver_bytes=watch.memory.driver,
        peak_worker_bytes=max(watch.memory.task_worker, watch.memory.model_actor),
        peak_object_store_bytes=watch.object_store,
        manifest_bytes=len(text),
    )


def _make_up(output: Output, rows: int, rows_per_file: int) -> None:
    """Files and marks as a run leaves them that was killed after ``rows`` rows."""

    def write(part: tuple[int, int]) -> None:
        first, count = part
        table = _read_table(first, count)
        name = f"madeup_{first:012d}"
        nothing = pa.nulls(count, _SCHEMA.field("pooled").type)
        columns = table.drop_columns(["bytes"]).append_column("pooled", nothing)
        for path, content in (
            (("features", f"{name}-0.parquet"), columns.select(_SCHEMA.names)),
            ((CHECKPOINT, f"{name}.parquet"), table.select(["image_id"])),
        ):
            with storage.atomic_writer(output.uri(*path)) as file:
                pq.write_table(content, file)

    with ThreadPoolExecutor() as threads:
        for _ in threads.map(write, _parts(rows, rows_per_file)):
            pass


def _parts(rows: int, size: int) -> list[tuple[int, int]]:
    return [(first, min(size, rows - first)) for first in range(0, rows, size)]


def _read(first: int, count: int) -> Iterator[pa.Table]:
    yield _read_table(first, count)


def _read_table(first: int, count: int) -> pa.Table:
    ids = [f"folder/{number:012d}.jpg" for number in range(first, first + count)]
    return source_rows(ids, ["train"] * count, ids, [None] * count, [_WHY] * count)
