"""How much of a killed run is kept: the driver is killed in a first run, in a continued one, then it may end."""

import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.config import BenchmarkKeptConfig
from benchmarks.measurement import Measurement, Row
from captioner.artifacts.manifests import Record
from captioner.artifacts.output import Output
from captioner.artifacts.tables import feature_rows
from captioner.config import ShapesConfig
from captioner.encoders.spec import FeatureShape
from captioner.features.pipeline import run_pipeline
from captioner.features.row_marks import count_done, finish_rows
from captioner.features.stage import PIXELS, Stage
from captioner.runtime.cluster import plan_pool, start_local_ray
from captioner.sources.shapes import ShapesSource

# Seconds after which workers have noticed that their Ray is gone.
_ORPHANED = 3.0
_IDENTITY = {"job": "kept"}
_SHAPE = FeatureShape(64, 64, 1, 1)


@dataclass(frozen=True)
class _Run:
    """One start of the stand-in job, as its process's arguments have it."""

    cpus: int
    seconds: float
    images: int
    folder: str

    @property
    def log(self) -> Path:
        return Path(self.folder, "log")

    def output(self) -> Output:
        return Output(f"{self.folder}/out", _IDENTITY)


class _Sleeper(Stage):
    """Stands in for an encoder: takes its time for each picture, and notes its id."""

    loaded = pa.schema([pa.field(PIXELS, pa.fixed_shape_tensor(pa.uint8(), [224, 224, 3]))])

    def __init__(self, seconds: float, log: Path):
        self.seconds, self.log = seconds, log

    def load(self, data: bytes) -> dict[str, Any]:
        return {PIXELS: np.zeros((224, 224, 3), np.uint8)}

    def prepare(self) -> None:
        pass

    def __call__(self, batch: pa.Table) -> pa.Table:
        for name in batch["image_id"].to_pylist():
            time.sleep(self.seconds)
            with self.log.open("a") as file:
                file.write(f"{name}\n")
        pooled = np.zeros((len(batch), *_SHAPE.of("pooled")), np.float32)
        return pa.table({"pooled": pa.FixedShapeTensorArray.from_numpy_ndarray(pooled)})


class KeptRow(Record):
    """A kill, and what was kept at it."""

    cpus: int
    """Logical."""
    encoders: int
    seconds_per_image: float
    """Of an encoder."""
    run: str
    """first or continued."""
    killed_after: float
    """Seconds after its first picture was encoded."""
    encoded: int
    """Pictures of this run."""
    kept: int
    """Pictures of this run that lie in complete files."""
    lost_seconds: float
    """What encoding the others took, the encoders side by side."""
    files: int


class KeptBenchmark(Measurement):
    """What kills cost, and whether every picture came out once at the end."""

    images: int
    kills: tuple[KeptRow, ...]

    def table(self) -> str:
        head = "cpus  s/image  run        killed after  encoded     kept  lost s  files"
        return "\n".join(
            [
                head,
                *(
                    f"{one.cpus:4}  {one.seconds_per_image:7}  {one.run:9}  {one.killed_after:10.0f} s"
                    f"  {one.encoded:7,}  {one.kept:7,}  {one.lost_seconds:6.1f}  {one.files:5,}"
                    for one in self.kills
                ),
            ]
        )

    def rows(self) -> Sequence[Row]:
        return [one.model_dump() | {"images": self.images} for one in self.kills]


def benchmark_kept(config: BenchmarkKeptConfig) -> KeptBenchmark:
    """Kill and continue a stand-in extraction for each number of CPUs and each speed of ``config``."""

    def kill(cell: tuple[int, float]) -> list[KeptRow]:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            return list(_kill(_Run(*cell, config.images, folder), config.kill_after))

    cells = list(product(config.cpus, config.seconds_per_image))
    with ThreadPoolExecutor(config.side_by_side) as threads:
        kills = [row for rows in threads.map(kill, cells) for row in rows]
    return KeptBenchmark(images=config.images, kills=tuple(kills))


def _kill(run: _Run, moments: Sequence[float]) -> Iterator[KeptRow]:
    encoded_before = kept_before = files_before = 0
    for number, moment in enumerate(moments):
        child = _start(run)
        try:
            _wait(lambda before=encoded_before: len(_encoded(run)) > before, child)
            time.sleep(moment)
            ended = child.poll() is not None
        finally:
            _end(child)
        if ended:
            return
        with run.output() as output:
            kept = count_done(output)
        # A driver killed leaves pictures in the making; those of the log are done.
        encoded, files = len(_encoded(run)), _files(run)
        encoders = int(Path(run.folder, "encoders").read_text())
        lost = (encoded - encoded_before) - (kept - kept_before)
        yield KeptRow(
            cpus=run.cpus,
            encoders=encoders,
            seconds_per_image=run.seconds,
            run="continued" if number else "first",
            killed_after=moment,
            encoded=encoded - encoded_before,
            kept=kept - kept_before,
            lost_seconds=lost * run.seconds / encoders,
            files=files - files_before,
        )
        encoded_before, kept_before, files_before = encoded, kept, files
    names = Counter(_encoded(run))
    twice = sum(count - 1 for count in names.values())
    lost = encoded_before - kept_before
    logging.getLogger(__name__).info("%d encoded more than once, at most %d", twice, lost)


def _encoded(run: _Run) -> list[str]:
    return run.log.read_text().splitlines() if run.log.exists() else []


def _files(run: _Run) -> int:
    return len(list(Path(run.folder, "out", "features").glob("*.parquet")))


def _start(run: _Run) -> "subprocess.Popen[bytes]":
    arguments = (run.cpus, run.seconds, run.images, run.folder)
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.kept", *map(str, arguments)], start_new_session=True
    )


def _wait(happened: Any, child: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 300
    while not happened():
        if child.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError("the stand-in job ended or did not begin")
        time.sleep(0.2)


def _end(child: "subprocess.Popen[bytes]") -> None:
    """The driver, and the Ray that it started."""
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    time.sleep(_ORPHANED)


def _main(run: _Run) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    start_local_ray(num_cpus=run.cpus, include_dashboard=False, logging_level=logging.ERROR)
    source = ShapesSource(ShapesConfig(train=run.images - 2, validation=1, test=1))
    pool = plan_pool(run.images)
    Path(run.folder, "encoders").write_text(str(pool.size))
    schema = feature_rows(_SHAPE, grid=False, thumbnails=False)
    stage = _Sleeper(run.seconds, run.log)
    with run.output() as output:
        run_pipeline(source, output, "features", schema, stage, batch_size=32, pool=pool)
        finish_rows(output, "features", run.images)


if __name__ == "__main__":
    _cpus, _seconds, _images, _folder = sys.argv[1:]
    _main(_Run(int(_cpus), float(_seconds), int(_images), _folder))
