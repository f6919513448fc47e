"""How fast extraction runs here, and what limits it: loading alone, the encoder alone, then the pipeline."""

import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import pyarrow as pa
import safetensors.torch

from benchmarks.config import BenchmarkExtractConfig
from benchmarks.measurement import Measurement, Row
from benchmarks.stages import fence_cost, load_rate, model_rate, take_sample
from benchmarks.watch import Watch
from captioner import storage
from captioner.artifacts.id_set import NONE, IdSet
from captioner.artifacts.manifests import SourceIdentity
from captioner.artifacts.output import Output
from captioner.artifacts.tables import feature_rows
from captioner.config import ImageLimits, Runtime
from captioner.encoders.family import family_of
from captioner.encoders.spec import EncoderSpec
from captioner.encoders.weights import ENCODER_WEIGHTS
from captioner.features.encode import EncodeImages
from captioner.features.extract import compute_on_cluster
from captioner.features.pipeline import run_pipeline
from captioner.images.views import view_names
from captioner.runtime.cluster import PoolPlan, num_cpus, num_gpus, plan_pool, start_ray
from captioner.sources import open_source
from captioner.sources.base import Listed, Source
from captioner.sources.outage import RETRY_SECONDS
from captioner.sources.tasks import Piece, PieceSource

logger = logging.getLogger(__name__)


class ExtractBenchmark(Measurement):
    """Rates are images per second over the whole cluster; memory is that of the driver's node."""

    cpus: int
    gpus: int
    """Of the cluster."""
    encoder: str
    compute: str
    """float32 or bfloat16."""
    encoders: int
    """Encoder actors."""
    threads: int
    """Of each encoder actor, on CPUs."""
    grid: bool
    views: int
    """Of each image, beside itself."""
    images: int
    batch_size: int
    load_only: float
    """All CPUs loading images, nothing else."""
    fence_cost: float
    """Share by which loading takes longer for being done in child processes."""
    model_only: float
    """All encoder actors on images already loaded; on CPUs in the faster runtime, not the pipeline's."""
    model_eager: float | None
    model_compiled: float | None
    """The same in each runtime that was measured."""
    runtime: str
    """That the pipeline's encoders ran in."""
    limit: float
    """What the pipeline could reach: the slower stage where GPUs encode, both sharing the cores otherwise."""
    pipeline: float
    """Steady rate: between a fifth and nine tenths of the images."""
    ratio: float
    """pipeline / limit."""
    bottleneck: str
    startup_seconds: float
    """Wall time of the pipeline beyond images / steady rate."""
    loaders_per_encoder: float
    """CPUs that must load to keep one encoder actor busy."""
    spilled_bytes: int
    peak_object_store_bytes: int
    peak_driver_bytes: int
    peak_encoder_bytes: int
    """Of the largest encoder actor; resident without shared memory, as for the driver and the workers."""
    peak_worker_bytes: int
    """Of the largest worker that reads, loads or writes."""

    def table(self) -> str:
        """For a terminal."""

        def mebibytes(value: int) -> str:
            return f"{value / 2**20:,.0f} MiB"

        rows = [
            ("loading only", f"{self.load_only:,.1f} images/s"),
            ("of it the fence's cost", f"{self.fence_cost:.1%}"),
            ("encoder only", f"{self.model_only:,.1f} images/s"),
            ("limit of both", f"{self.limit:,.1f} images/s"),
            ("pipeline, steady", f"{self.pipeline:,.1f} images/s"),
            ("pipeline / limit", f"{self.ratio:.2f}"),
            ("bottleneck", self.bottleneck),
            ("start-up", f"{self.startup_seconds:.1f} s"),
            ("loading CPUs per encoder", f"{self.loaders_per_encoder:.2f}"),
            ("spilled", mebibytes(self.spilled_bytes)),
            ("object store, peak", mebibytes(self.peak_object_store_bytes)),
            ("driver, peak", mebibytes(self.peak_driver_bytes)),
            ("largest encoder, peak", mebibytes(self.peak_encoder_bytes)),
            ("largest other worker, peak", mebibytes(self.peak_worker_bytes)),
        ]
        lines = [f"{name:28}{value}" for name, value in rows]
        head = f"{self.cpus} CPUs, {self.gpus} GPUs; {self.encoder} {self.compute}; {self.images:,} images"
        return "\n".join([head, *lines])

    def rows(self) -> Sequence[Row]:
        return [self.model_dump()]


class RepeatedSource:
    """A source's images over and over, under new ids, until there are enough."""

    def __init__(self, source: Source, images: int):
        self._source, self._images = source, images

    def identity(self) -> SourceIdentity:
        return self._source.identity()

    def files(self) -> Iterator[Listed]:
        yield from ()

    def states(self) -> Iterator[pa.RecordBatch]:
        yield from ()

    def num_images(self) -> int:
        return sum(piece.rows for piece in self._pieces())

    def images(
        self, _done: IdSet = NONE, /, *, retry_seconds: float = RETRY_SECONDS
    ) -> PieceSource:
        return PieceSource("Repeated", self._pieces())

    def captions(self) -> Iterator[pa.RecordBatch]:
        return iter(())

    def left_out(self) -> dict[str, int]:
        return {}

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


@dataclass(frozen=True)
class Extraction:
    """An extraction that is set up, and not begun."""

    source: Source
    spec: EncoderSpec
    stage: EncodeImages
    pool: PoolPlan
    batch_size: int
    output: Output

    @classmethod
    def set_up(cls, config: BenchmarkExtractConfig, root: str) -> "Extraction":
        """
        Args:
            root: empty directory for the output (path or URI).

        Raises:
            SourceError, ModelError, ConfigError: as in extraction.
        """
        source = open_source(config.source, config.source_options)
        family, _ = family_of(config.encoder.name)
        tensors, _ = family.weights(config.encoder)
        start_ray()
        pool = plan_pool(
            config.images, size=config.num_encoders, cpus_per_actor=config.cpus_per_encoder
        )
        spec = family.spec(config.encoder, tensors, compute_on_cluster(config.encoder.compute))
        output = Output(root, {"job": "benchmark"})
        storage.write_bytes(output.uri(ENCODER_WEIGHTS), safetensors.torch.save(tensors))
        stage = EncodeImages(
            output.uri(ENCODER_WEIGHTS),
            spec,
            ImageLimits(),
            grid=config.grid,
            mirrored=config.mirrored,
            crops=config.crops,
            threads=pool.threads,
            runtime=config.runtime,
        )
        return cls(source, spec, stage, pool, config.batch_size or pool.batch_size, output)

    def run(self, images: int, watch: Watch) -> tuple[int, float]:
        """Extract so many images or a few more. Returns how many, and the seconds of it."""
        repeated = RepeatedSource(self.source, images)
        views = view_names(self.stage.mirrored, self.stage.crops)
        started = time.perf_counter()
        with self.output, watch:
            run_pipeline(
                repeated,
                self.output,
                "features",
                feature_rows(self.spec.shape, grid=self.stage.grid, views=views),
                self.stage,
                batch_size=self.batch_size,
                pool=self.pool,
                counter=watch.counter,
            )
        return repeated.num_images(), time.perf_counter() - started


def benchmark_extract(config: BenchmarkExtractConfig) -> ExtractBenchmark:
    """Measure extraction with the settings of ``config``.

    Raises:
        SourceError, ModelError, ConfigError: as in extraction.
    """
    with tempfile.TemporaryDirectory() as folder:
        extraction = Extraction.set_up(config, config.scratch or f"{folder}/out")
        stage, pool, spec = extraction.stage, extraction.pool, extraction.spec
        watch = Watch()
        sample = take_sample(extraction.source)
        logger.info("loading alone, %.0f s", config.seconds)
        loading = load_rate(sample, stage, config.seconds)
        cost = fence_cost(sample, stage, config.seconds)
        logger.info("the encoder alone, %.0f s", config.seconds)
        models = {
            name: model_rate(sample, extraction.batch_size, config.seconds, other, pool)
            for name, other in _runtimes(stage).items()
        }
        model = max(models.values())
        logger.info("the pipeline")
        images, wall = extraction.run(config.images, watch)
    steady = watch.steady(images)
    # On GPUs the stages run side by side; on CPUs alone they take turns on the same cores.
    gpus, cpus = num_gpus(), num_cpus()
    limit = min(loading, model) if gpus else 1 / (1 / loading + 1 / model)
    share = (1 / model) / (1 / loading + 1 / model)
    return ExtractBenchmark(
        cpus=cpus,
        gpus=gpus,
        encoder=spec.title,
        compute=spec.precision,
        encoders=pool.size,
        threads=pool.threads,
        grid=config.grid,
        views=len(view_names(config.mirrored, config.crops)),
        images=images,
        batch_size=extraction.batch_size,
        load_only=loading,
        fence_cost=cost,
        model_only=model,
        model_eager=models.get("eager"),
        model_compiled=models.get("compiled"),
        runtime=stage.runtime,
        limit=limit,
        pipeline=steady,
        ratio=steady / limit,
        bottleneck=_bottleneck(loading, model, share, gpus > 0),
        startup_seconds=max(0.0, wall - images / steady),
        loaders_per_encoder=(model / pool.size) / (loading / cpus),
        spilled_bytes=watch.spilled,
        peak_object_store_bytes=watch.object_store,
        peak_driver_bytes=watch.memory.driver,
        peak_encoder_bytes=watch.memory.model_actor,
        peak_worker_bytes=watch.memory.task_worker,
    )


def _runtimes(stage: EncodeImages) -> dict[str, EncodeImages]:
    """The stage in every runtime; on GPUs in its own alone, as compiling takes minutes there."""
    found = {}
    for name in (stage.runtime,) if num_gpus() else get_args(Runtime):
        found[name] = copy(stage)
        found[name].runtime = name
    return found


def _bottleneck(loading: float, model: float, share: float, gpus: bool) -> str:
    if gpus:
        return "encoder" if model <= loading else "loading"
    name, part = ("encoder", share) if share >= 0.5 else ("loading", 1 - share)
    return f"{name}, {part:.0%} of the cores' work"


def _renamed(read: Any, prefix: str) -> Iterator[pa.Table]:
    for table in read():
        ids = pa.compute.binary_join_element_wise(prefix, table["image_id"], "")
        yield table.set_column(0, table.schema.field("image_id"), ids)
