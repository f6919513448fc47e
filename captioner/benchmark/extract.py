"""How fast extraction runs here, and what holds it back: each stage alone, then the pipeline, in one run."""

import logging
import os
import platform
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import safetensors.torch
from ray._private.internal_api import get_memory_info_reply, get_state_from_address

from captioner import storage
from captioner.cluster import PoolPlan, num_cpus, num_gpus, plan_pool, start_ray
from captioner.config import BenchmarkExtractConfig, ImageLimits
from captioner.encoder import identify, load_weights
from captioner.features import EncodeImages, compute_on_cluster
from captioner.pipeline import PIXELS, decode_rows, run_pipeline
from captioner.progress import Counter
from captioner.schema import EncoderIdentity, Record, SourceIdentity, feature_rows
from captioner.sources import open_source
from captioner.sources.base import Source
from captioner.sources.tasks import Piece, PieceSource
from captioner.store import ENCODER_WEIGHTS

logger = logging.getLogger(__name__)

_SAMPLE = 256


class ExtractBenchmark(Record):
    """Rates are images per second over the whole cluster."""

    machine: str
    encoder: str
    images: int
    batch_size: int
    decode_only: float
    """All CPUs decoding, nothing else."""
    model_only: float
    """All encoder actors on images already decoded."""
    limit: float
    """What the pipeline could reach: the slower stage where a GPU runs the model, both sharing the cores otherwise."""
    pipeline: float
    """Steady rate: between a fifth and nine tenths of the images."""
    ratio: float
    """pipeline / limit."""
    bottleneck: str
    startup_seconds: float
    """Wall time of the pipeline beyond images / steady rate."""
    decoders_per_encoder: float
    """CPUs that must decode to keep one encoder actor busy."""
    spilled_bytes: int
    peak_object_store_bytes: int
    peak_worker_rss_bytes: int
    """Largest resident memory of one of this cluster's worker processes on the driver's node."""

    def table(self) -> str:
        """For a terminal."""
        rows = [
            ("decode only", f"{self.decode_only:,.1f} images/s"),
            ("model only", f"{self.model_only:,.1f} images/s"),
            ("limit of both", f"{self.limit:,.1f} images/s"),
            ("pipeline, steady", f"{self.pipeline:,.1f} images/s"),
            ("pipeline / limit", f"{self.ratio:.2f}"),
            ("bottleneck", self.bottleneck),
            ("start-up", f"{self.startup_seconds:.1f} s"),
            ("decoding CPUs per encoder", f"{self.decoders_per_encoder:.2f}"),
            ("spilled", f"{self.spilled_bytes / 2**20:,.0f} MiB"),
            ("object store, peak", f"{self.peak_object_store_bytes / 2**20:,.0f} MiB"),
            ("largest worker, peak RSS", f"{self.peak_worker_rss_bytes / 2**20:,.0f} MiB"),
        ]
        lines = [f"{name:28}{value}" for name, value in rows]
        return "\n".join([f"{self.machine}; {self.encoder}; {self.images:,} images", *lines])


class RepeatedSource:
    """A source's images over and over, under new ids, until there are enough."""

    def __init__(self, source: Source, images: int):
        self._source, self._images = source, images

    def identity(self) -> SourceIdentity:
        return self._source.identity()

    def num_images(self) -> int:
        return sum(piece.rows for piece in self._pieces())

    def images(self) -> PieceSource:
        return PieceSource("Repeated", self._pieces())

    def captions(self) -> Iterator[pa.RecordBatch]:
        return iter(())

    def _pieces(self) -> list[Piece]:
        pieces: list[Piece] = []
        rows, turn = 0, 0
        while rows < self._images:
            for task in self._source.images().get_read_tasks(1):
                read = partial(_renamed, task.read_fn, f"{turn:05d}/")
                size = task.metadata.size_bytes or 0
                pieces.append(Piece(read, task.metadata.num_rows or 0, size))
                rows += pieces[-1].rows
                if rows >= self._images:
                    return pieces
            turn += 1
        return pieces


def benchmark_extract(config: BenchmarkExtractConfig) -> ExtractBenchmark:
    """Measure extraction with the settings of ``config``.

    Raises:
        SourceError, ModelError: as in extraction.
    """
    source = open_source(config.source, config.source_options)
    tensors = load_weights(config.encoder)
    start_ray()
    identity = identify(config.encoder, tensors, compute_on_cluster(config.encoder.compute))
    pool = plan_pool(config.num_encoders, config.cpus_per_encoder)
    with tempfile.TemporaryDirectory() as folder:
        output = storage.Output(f"{folder}/out", {"job": "benchmark"})
        storage.write_bytes(output.uri(ENCODER_WEIGHTS), safetensors.torch.save(tensors))
        sample = next(iter(source.images().get_read_tasks(1)[0].read_fn())).slice(0, _SAMPLE)
        logger.info("decoding alone, %.0f s", config.seconds)
        decode = _decode_rate(sample, config.seconds)
        options = _options(output, identity, config.grid, pool)
        logger.info("the model alone, %.0f s", config.seconds)
        model = _model_rate(sample, config, options, pool)
        logger.info("the pipeline")
        steady, wall, watch, images = _pipeline_rate(
            source, config, output, identity, options, pool
        )
    # On GPUs the stages run side by side; on CPUs alone they take turns on the same cores.
    limit = min(decode, model) if num_gpus() else 1 / (1 / decode + 1 / model)
    return ExtractBenchmark(
        machine=f"{num_cpus()} CPUs, {num_gpus()} GPUs, {platform.machine()}",
        encoder=f"{config.encoder.name} {config.encoder.layer} {identity.compute}",
        images=images,
        batch_size=config.batch_size,
        decode_only=decode,
        model_only=model,
        limit=limit,
        pipeline=steady,
        ratio=steady / limit,
        bottleneck="the model" if model <= decode else "decoding",
        startup_seconds=max(0.0, wall - images / steady),
        decoders_per_encoder=(model / pool.size) / (decode / num_cpus()),
        spilled_bytes=watch.spilled,
        peak_object_store_bytes=watch.store,
        peak_worker_rss_bytes=watch.rss,
    )


def _options(
    output: storage.Output, identity: EncoderIdentity, grid: bool, pool: PoolPlan
) -> dict[str, Any]:
    return {
        "weights_uri": output.uri(ENCODER_WEIGHTS),
        "identity": identity,
        "grid": grid,
        "mirrored": False,
        "threads": pool.threads,
    }


@ray.remote(num_cpus=1)
def _decode_for(sample: pa.Table, seconds: float) -> float:
    """Images per second of one CPU."""
    decode_rows(sample.slice(0, 8), ImageLimits())
    done, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        done += len(decode_rows(sample.slice(0, 64), ImageLimits()))
    return done / (time.perf_counter() - started)


def _decode_rate(sample: pa.Table, seconds: float) -> float:
    shared = ray.put(sample)
    # Started and thrown away first: a worker's start-up must not count against the others.
    ray.get([_decode_for.remote(shared, 0.1) for _ in range(num_cpus())])
    return float(sum(ray.get([_decode_for.remote(shared, seconds) for _ in range(num_cpus())])))


class _Model:
    """An encoder actor on its own."""

    def __init__(self, options: dict[str, Any]):
        self.stage = EncodeImages(**options)

    def rate(self, images: np.ndarray[Any, Any], seconds: float) -> float:
        done, started = 0, time.perf_counter()
        while time.perf_counter() - started < seconds:
            done += len(self.stage(pa.table({}), images))
        return done / (time.perf_counter() - started)


def _model_rate(
    sample: pa.Table, config: BenchmarkExtractConfig, options: dict[str, Any], pool: PoolPlan
) -> float:
    pixels = decode_rows(sample.slice(0, config.batch_size), ImageLimits())[PIXELS]
    images = np.array(pixels.combine_chunks().to_numpy_ndarray())
    images = np.resize(images, (config.batch_size, *images.shape[1:]))
    build = ray.remote(num_cpus=pool.num_cpus, num_gpus=pool.num_gpus)(_Model)
    actors = [build.remote(options) for _ in range(pool.size)]
    ray.get([actor.rate.remote(images, 0.5) for actor in actors])
    rate = float(sum(ray.get([actor.rate.remote(images, config.seconds) for actor in actors])))
    for actor in actors:
        ray.kill(actor)
    return rate


class _Watch:
    """Samples progress and memory while the pipeline runs."""

    def __init__(self) -> None:
        self.counter = Counter.remote()
        self.samples: list[tuple[float, int]] = []
        self.store = self.rss = self.spilled = 0
        self._state = get_state_from_address(ray.get_runtime_context().gcs_address)
        self._before = get_memory_info_reply(self._state).store_stats.spilled_bytes_total
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "_Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(0.5):
            done, _ = ray.get(self.counter.read.remote())
            self.samples.append((time.perf_counter(), done))
            stats = get_memory_info_reply(self._state).store_stats
            self.store = max(self.store, stats.object_store_bytes_used)
            self.spilled = stats.spilled_bytes_total - self._before
            self.rss = max(self.rss, _largest_worker())

    def steady_rate(self, images: int) -> float:
        inside = [
            (when, done) for when, done in self.samples if 0.2 * images <= done <= 0.9 * images
        ]
        if len(inside) < 2 or inside[-1][1] == inside[0][1]:
            # Too few images for a middle part: the whole, from the first finished batch on.
            inside = [sample for sample in self.samples if sample[1]]
        (first, start), (last, end) = inside[0], inside[-1]
        return (end - start) / max(1e-9, last - first)


def _largest_worker() -> int:
    """Resident bytes of the largest Ray worker below this process's cluster on this node, shared memory left out."""
    largest = 0
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/cmdline", "rb") as file:
                    if not file.read(5).startswith(b"ray::"):
                        continue
                with open(f"/proc/{name}/statm") as file:
                    _, resident, shared, *_ = file.read().split()
            except (FileNotFoundError, ProcessLookupError):
                continue  # it ended meanwhile
            largest = max(largest, (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE"))
    return largest


def _pipeline_rate(
    source: Source,
    config: BenchmarkExtractConfig,
    output: storage.Output,
    identity: EncoderIdentity,
    options: dict[str, Any],
    pool: PoolPlan,
) -> tuple[float, float, _Watch, int]:
    repeated = RepeatedSource(source, config.images)
    images = repeated.num_images()
    with _Watch() as watch:
        started = time.perf_counter()
        run_pipeline(
            repeated,
            output,
            "features",
            feature_rows(identity.channels, config.grid),
            EncodeImages,
            options,
            limits=ImageLimits(),
            batch_size=config.batch_size,
            pool=pool,
            counter=watch.counter,
        )
        wall = time.perf_counter() - started
    return watch.steady_rate(images), wall, watch, images


def _renamed(read: Any, prefix: str) -> Iterator[pa.Table]:
    for table in read():
        ids = pa.compute.binary_join_element_wise(prefix, table["image_id"], "")
        yield table.set_column(0, table.schema.field("image_id"), ids)
