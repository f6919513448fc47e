"""Extraction over many GPUs, of which none is there: Ray's nodes and GPUs are logical, loading and the network sleep.

What remains is what the driver, the head and the scheduling take, and where these bend the rate. Processes are real, so
a small machine is busy itself: ``machine_busy`` near 1 says that a row is about this machine.
"""

import logging
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import ray
from ray.cluster_utils import Cluster

from benchmarks.config import BenchmarkSimulateConfig
from benchmarks.measurement import Measurement, Row
from captioner.artifacts.id_set import NONE, IdSet
from captioner.artifacts.manifests import Record
from captioner.artifacts.output import Output
from captioner.artifacts.tables import feature_rows
from captioner.encoders.spec import FeatureShape
from captioner.features.pipeline import run_pipeline
from captioner.features.stage import PIXELS, Stage
from captioner.runtime.cluster import plan_pool
from captioner.runtime.progress import Ticker, start_counter
from captioner.sources.outage import RETRY_SECONDS
from captioner.sources.shapes import ShapesSource
from captioner.sources.tasks import Piece, PieceSource, source_rows

_SHAPE = FeatureShape(64, 64, 1, 1)
# Of the pictures: small, for what is measured is no copying, and as large encoded as loaded: blocks are cut by bytes.
_SIDE = 16
_ENCODED = bytes(3 * _SIDE**2)
_ROWS_PER_PIECE = 500
_STORE_BYTES = 2 * 10**8  # of a node
_SECONDS = 0.5  # between two samples
# Of the pictures, between which the rate is taken.
_STEADY = (0.3, 0.95)


class SimulatedRow(Record):
    """One number of GPUs."""

    gpus: int
    loaders: int
    """CPUs that load."""
    batch_size: int
    images: int
    images_per_second: float
    """Steady."""
    ideal: float
    """What the GPUs would do that never wait."""
    ratio: float
    """images_per_second / ideal."""
    driver_cpu: float
    """Share of a core that the driver takes meanwhile."""
    head_cpu: float
    """The same of the head's GCS, raylet and agents."""
    driver_ms_per_batch: float
    """Time of a core that the driver takes for a batch, from reading to writing."""
    cluster_seconds: float
    """Until all nodes are there."""
    startup_seconds: float
    """From there to the first pictures that come out."""
    machine_busy: float
    """Share of this machine's cores that is in use, by whomever."""


class SimulateBenchmark(Measurement):
    """What ``benchmark_simulate`` found."""

    seconds_to_load: float
    rates: list[SimulatedRow]

    def table(self) -> str:
        head = "gpus  loaders  images/s   ideal  ratio  driver  head  ms/batch  cluster  start-up  machine"
        return "\n".join(
            [
                head,
                *(
                    f"{one.gpus:4}  {one.loaders:7}  {one.images_per_second:8,.0f}  {one.ideal:6,.0f}  {one.ratio:5.2f}"
                    f"  {one.driver_cpu:6.2f}  {one.head_cpu:4.2f}  {one.driver_ms_per_batch:8.1f}"
                    f"  {one.cluster_seconds:5.0f} s  {one.startup_seconds:6.0f} s  {one.machine_busy:7.2f}"
                    for one in self.rates
                ),
            ]
        )

    def rows(self) -> Sequence[Row]:
        around = self.model_dump(exclude={"rates"})
        return [around | one.model_dump() for one in self.rates]


def benchmark_simulate(config: BenchmarkSimulateConfig) -> SimulateBenchmark:
    """Simulate each number of GPUs in a process and a cluster of its own."""
    rates = []
    for gpus in config.gpus:
        logging.getLogger(__name__).info("%d GPUs", gpus)
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            arguments = [sys.executable, "-m", "benchmarks.simulate", str(gpus), folder]
            arguments.append(config.model_dump_json(by_alias=True))
            subprocess.run(arguments, check=True)
            rates.append(SimulatedRow.model_validate_json(Path(folder, "row.json").read_text()))
    return SimulateBenchmark(seconds_to_load=config.seconds_to_load, rates=rates)


class _Sleeper(Stage):
    """Stands in for loading and for a network: each takes its time for every picture, the network one after another."""

    loaded = pa.schema([pa.field(PIXELS, pa.fixed_shape_tensor(pa.uint8(), [_SIDE, _SIDE, 3]))])
    calls_on_gpu = 2

    def __init__(self, to_load: float, to_encode: float):
        self.to_load, self.to_encode = to_load, to_encode

    def load(self, data: bytes) -> dict[str, Any]:
        time.sleep(self.to_load)
        return {PIXELS: np.zeros((_SIDE, _SIDE, 3), np.uint8)}

    def prepare(self) -> None:
        self.device = threading.Lock()

    def __call__(self, batch: pa.Table) -> pa.Table:
        with self.device:
            time.sleep(self.to_encode * len(batch))
        pooled = np.zeros((len(batch), *_SHAPE.of("pooled")), np.float32)
        return pa.table({"pooled": pa.FixedShapeTensorArray.from_numpy_ndarray(pooled)})


class _Pictures(ShapesSource):
    """So many pictures that nobody draws."""

    def __init__(self, count: int):
        self.count = count

    def num_images(self) -> int:
        return self.count

    def images(
        self, _done: IdSet = NONE, /, *, retry_seconds: float = RETRY_SECONDS
    ) -> PieceSource:
        pieces = []
        for first in range(0, self.count, _ROWS_PER_PIECE):
            rows = min(_ROWS_PER_PIECE, self.count - first)
            pieces.append(Piece(partial(_read, first, rows), rows, rows * len(_ENCODED)))
        return PieceSource("Pictures", pieces)


def _read(first: int, rows: int) -> Iterator[pa.Table]:
    ids = [f"{number:09d}" for number in range(first, first + rows)]
    nothing: list[None] = [None] * rows
    yield source_rows(ids, ids, [_ENCODED] * rows, nothing, nothing, sizes=[len(_ENCODED)] * rows)


class _Load:
    """Pictures done, and time of processors taken by the driver and the head, again and again."""

    def __init__(self, cluster: Cluster):
        self.counter = start_counter()
        self.samples: list[tuple[float, int, float, float, float]] = []
        head = cluster.head_node.all_processes
        self._head = [psutil.Process(one.process.pid) for all_ in head.values() for one in all_]
        self._me = psutil.Process()

    def sample(self) -> None:
        done, _ = ray.get(self.counter.read.remote())
        busy = psutil.cpu_times()
        self.samples.append(
            (
                time.perf_counter(),
                done,
                _seconds(self._me),
                sum(map(_seconds, self._head)),
                sum(busy) - busy.idle - busy.iowait,
            )
        )


def _seconds(process: psutil.Process) -> float:
    """Of processors that a process has taken."""
    taken = process.cpu_times()
    return float(taken.user + taken.system)


def _main(gpus: int, folder: Path, config: BenchmarkSimulateConfig) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    started = time.perf_counter()
    # As on a cluster: the head runs no tasks, and each node has one GPU.
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    for _ in range(gpus):
        cluster.add_node(
            num_cpus=config.loaders, num_gpus=1, object_store_memory=_STORE_BYTES, wait=False
        )
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    there = time.perf_counter()
    images = int(gpus * config.images_per_second * config.seconds)
    pool = plan_pool(images)
    batch_size = config.batch_size or pool.batch_size
    stage = _Sleeper(config.seconds_to_load, 1 / config.images_per_second)
    load = _Load(cluster)
    with Output(f"{folder}/out", {"job": "simulate"}) as output, Ticker(load.sample, _SECONDS):
        run_pipeline(
            _Pictures(images),
            output,
            "features",
            feature_rows(_SHAPE, grid=False, thumbnails=False),
            stage,
            batch_size=batch_size,
            pool=pool,
            counter=load.counter,
        )
    least, most = (share * images for share in _STEADY)
    inside = [one for one in load.samples if least <= one[1] <= most]
    first, last = inside[0], inside[-1]
    seconds, done, driver, head, busy = (b - a for a, b in zip(first, last, strict=True))
    ideal = gpus * config.images_per_second
    row = SimulatedRow(
        gpus=gpus,
        loaders=gpus * config.loaders,
        batch_size=batch_size,
        images=images,
        images_per_second=done / seconds,
        ideal=ideal,
        ratio=done / seconds / ideal,
        driver_cpu=driver / seconds,
        head_cpu=head / seconds,
        driver_ms_per_batch=1e3 * driver / (done / batch_size),
        cluster_seconds=there - started,
        startup_seconds=next(one[0] for one in load.samples if one[1]) - there,
        machine_busy=busy / seconds / psutil.cpu_count(),
    )
    Path(folder, "row.json").write_text(row.model_dump_json())
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    _gpus, _folder, _config = sys.argv[1:]
    _main(int(_gpus), Path(_folder), BenchmarkSimulateConfig.model_validate_json(_config))
