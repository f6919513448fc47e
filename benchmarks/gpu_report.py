"""Everything that a GPU does here, measured by one command: a table of figures, and a page that says what they mean."""

import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import get_args

import pyarrow as pa
import ray

from benchmarks.config import (
    BenchmarkExtractConfig,
    BenchmarkGpuConfig,
    BenchmarkServeConfig,
    GpuPart,
)
from benchmarks.extract import Extraction
from benchmarks.measurement import Measurement, Row, circumstances
from benchmarks.pictures import write_pictures
from benchmarks.serve import benchmark_serve
from benchmarks.stages import load_rate, model_rate, take_sample
from benchmarks.train import measure_steps, vocabulary_of
from benchmarks.watch import Watch
from captioner import storage
from captioner.artifacts.feature_store import FeatureStore
from captioner.artifacts.manifests import Record
from captioner.captioning.captioner import Captioner
from captioner.config import (
    DecoderConfig,
    EncoderConfig,
    ExtractConfig,
    Runtime,
    SourceConfig,
    TextConfig,
    TrainConfig,
)
from captioner.features.extract import extract
from captioner.runtime.cluster import num_cpus, num_gpus, start_ray
from captioner.runtime.device import has_avx512, prepare_device
from captioner.training.run import run_training

logger = logging.getLogger(__name__)

_TARGETS = """\
Targets where there is a GPU: extraction at least .85 of the lower of its two limits, loading and model, and at least
5,000 images/s with 16 cores beside an H100 or H200; the GPU busy at least .9 of the time where loading does not hold it
back."""


@dataclass(frozen=True)
class _Size:
    """How much of everything."""

    pictures: int
    captions: int
    """Of each picture."""
    images: int
    """Least through a pipeline."""
    encoder: str
    input_size: int | None
    steps: int
    width: int
    clients: tuple[int, ...]


_WHOLE = _Size(512, 40, 4000, "resnet50", None, 150, 512, (1, 8, 32, 64))
_SMOKE = _Size(40, 30, 100, "timm:resnet10t", 64, 5, 32, (2,))


class Figure(Record):
    """One figure."""

    part: str
    what: str
    value: float
    unit: str


class GpuReport(Measurement):
    """Figures in the order in which they were taken."""

    smoke: bool
    cpus: int
    gpus: int
    """Of the cluster."""
    figures: list[Figure]

    def table(self) -> str:
        return "\n".join(
            f"{one.part:12}{one.what:44}{one.value:>12,.4g} {one.unit}" for one in self.figures
        )

    def rows(self) -> Sequence[Row]:
        around = self.model_dump(include={"smoke", "cpus", "gpus"})
        return [around | one.model_dump() for one in self.figures]

    def page(self) -> str:
        """Markdown."""
        around = circumstances()
        lines = [
            "# GPU report",
            "",
            f"{around['gpu']}, {around['processor']}, {around['cores']} cores; in Ray {self.gpus} GPUs and {self.cpus} "
            f"logical CPUs; torch {around['torch']}, Ray {around['ray']}; commit {around['commit']}, {around['date']}.",
            "",
        ]
        if self.smoke:
            lines += ["A smoke run: a small network, few pictures. The figures mean nothing.", ""]
        elif not self.gpus:
            lines += ["No GPU was there: these are figures of CPUs.", ""]
        for part in dict.fromkeys(one.part for one in self.figures):
            lines += [f"## {part.capitalize()}", "", "| what | value | unit |", "|---|---|---|"]
            lines += [
                f"| {one.what} | {one.value:,.4g} | {one.unit} |"
                for one in self.figures
                if one.part == part
            ]
            lines.append("")
        return "\n".join([*lines, _TARGETS, ""])


@dataclass
class _Bench:
    """What the parts share."""

    config: BenchmarkGpuConfig
    size: _Size
    folder: Path
    pictures: str
    rates: dict[str, float] = field(default_factory=dict)
    """Limits of extraction, in images per second: of loading, and of the model."""

    @property
    def seconds(self) -> float:
        """Of each measurement."""
        return 0.3 if self.config.smoke else self.config.seconds

    @property
    def encoder(self) -> EncoderConfig:
        return EncoderConfig(
            name=self.size.encoder,
            weights="random",
            input_size=self.size.input_size,
            # The CPUs of a smoke run need not have bfloat16.
            compute="float32" if self.config.smoke else "auto",
        )

    def extraction(self, name: str, **changes: bool | int | str) -> Extraction:
        settings = {"source": self.pictures, "encoder": self.encoder} | changes
        config = BenchmarkExtractConfig.model_validate(settings)
        return Extraction.set_up(config, str(self.folder / name))

    @cached_property
    def features(self) -> str:
        """A feature store of the pictures, with grids, to train on."""
        output = str(self.folder / "features")
        # Those of the generated pictures, which have captions.
        extract(
            ExtractConfig(
                source=str(self.folder / "pictures"), output=output, encoder=self.encoder, grid=True
            )
        )
        return output

    def training(self, **changes: object) -> TrainConfig:
        decoder = DecoderConfig(
            kind="adaptive_attention",
            width=self.size.width,
            ensemble_size=changes.pop("ensemble_size", 1),  # type: ignore[arg-type]
        )
        settings = {
            "features": self.features,
            "output": str(self.folder / "model"),
            "decoder": decoder,
            "text": TextConfig(min_count=1),
        }
        return TrainConfig.model_validate(settings | changes)

    @cached_property
    def model(self) -> str:
        """A model that has seen the captions once."""
        return run_training(self.training(epochs=1)).uri


def benchmark_gpu(config: BenchmarkGpuConfig) -> GpuReport:
    """Measure part by part; the page is written after each, so that what one has found outlives the next."""
    size = _SMOKE if config.smoke else _WHOLE
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        own = Path(folder, "pictures")
        write_pictures(own, size.pictures, size.captions)
        start_ray()
        bench = _Bench(config, size, Path(folder), config.pictures or str(own))
        report = GpuReport(smoke=config.smoke, cpus=num_cpus(), gpus=num_gpus(), figures=[])
        for part, measured in _PARTS.items():
            if part not in config.parts:
                continue
            logger.info("%s", part)
            for figure in measured(bench):
                report.figures.append(figure)
                storage.write_bytes(config.page, report.page().encode())
    return report


def _limits(bench: _Bench) -> Iterator[Figure]:
    extraction = bench.extraction("limits")
    sample = take_sample(extraction.source)
    stage, pool, batch = extraction.stage, extraction.pool, extraction.batch_size
    loading = load_rate(sample, stage, bench.seconds)
    yield Figure(part="limits", what="loading, all CPUs", value=loading, unit="images/s")
    per_cpu = loading / num_cpus()
    yield Figure(part="limits", what="loading, one CPU", value=per_cpu, unit="images/s")
    models = {}
    for runtime in get_args(Runtime):
        stage = bench.extraction(runtime, runtime=runtime).stage
        models[runtime] = model_rate(sample, batch, bench.seconds, stage, pool)
        what = f"model alone, {runtime}, {extraction.spec.precision}, batch {batch}"
        yield Figure(part="limits", what=what, value=models[runtime], unit="images/s")
    needed = models["eager"] / pool.size / per_cpu
    what = "CPUs that load for one GPU" if pool.num_gpus else "CPUs that load for one encoder"
    yield Figure(part="limits", what=what, value=needed, unit="CPUs")
    bench.rates |= {"loading": loading, "model": models["eager"]}


def _extraction(bench: _Bench) -> Iterator[Figure]:
    yield from _limits(bench)
    variants: dict[str, dict[str, bool | int | str]] = {
        "vectors": {},
        "vectors and grids": {"grid": True},
        "the same of 5 other views": {"grid": True, "mirrored": True, "crops": 4},
    }
    for name, settings in variants.items():
        extraction = bench.extraction(name.replace(" ", "_"), **settings)
        passes = 6 if "crops" in settings else 1
        limits = bench.rates["loading"], bench.rates["model"] / passes
        # On CPUs alone both share the cores.
        limit = min(limits) if num_gpus() else 1 / sum(1 / one for one in limits)
        watch = Watch()
        images, wall = extraction.run(
            max(bench.size.images // passes, int(2 * bench.seconds * limit)), watch
        )
        steady = watch.steady(images)
        found = {
            "steady": (steady, "images/s"),
            "of its limit": (steady / limit, ""),
            "start-up": (max(0.0, wall - images / steady), "s"),
            "spilled": (watch.spilled / 2**20, "MiB"),
        }
        if (busy := watch.gpu_utilisation(images)) is not None:
            found["GPU busy"] = busy, ""
        for what, (value, unit) in found.items():
            yield Figure(part="extraction", what=f"{name}: {what}", value=value, unit=unit)


def _training(bench: _Bench) -> Iterator[Figure]:
    # Without AVX512 CPUs train in float32 alone.
    computes = ("float32", "bfloat16") if num_gpus() or has_avx512() else ("float32",)
    cells = [(members, compute) for members in (1, 3) for compute in computes]
    settings = [bench.training(ensemble_size=one, compute=compute) for one, compute in cells]
    store = FeatureStore.open(bench.features)
    rates = measure_steps(settings, vocabulary_of(store, TextConfig(min_count=1)), bench.size.steps)
    for (members, compute), rate in zip(cells, rates, strict=True):
        name = f"{members} decoder{'s' * (members > 1)}, {compute}"
        for what, key, unit in (
            ("", "captions_per_second", "captions/s"),
            (", batches held as tensors", "in_memory_captions_per_second", "captions/s"),
            (", waiting for data", "data_wait_fraction", ""),
        ):
            yield Figure(part="training", what=f"{name}{what}", value=rate[key], unit=unit)


@ray.remote(num_cpus=0)
class _Captions:
    """A Captioner with nothing around it."""

    def __init__(self, model: str):
        self.captioner = Captioner.load(model, prepare_device())

    def rate(self, pictures: list[bytes], seconds: float) -> float:
        """Batches per second."""
        self.captioner.caption(pictures)
        done, started = 0, time.perf_counter()
        while time.perf_counter() - started < seconds:
            self.captioner.caption(pictures)
            done += 1
        return done / (time.perf_counter() - started)


def _captioning(bench: _Bench) -> Iterator[Figure]:
    pictures = _encoded(take_sample(bench.extraction("captioning").source))
    captions = _Captions.options(num_gpus=min(1, num_gpus())).remote(bench.model)  # type: ignore[attr-defined]
    for size in (1, 32):
        batch = [pictures[number % len(pictures)] for number in range(size)]
        rate = float(ray.get(captions.rate.remote(batch, bench.seconds)))
        what = f"pictures loaded, encoded, searched; batch {size}"
        yield Figure(part="captioning", what=what, value=rate * size, unit="images/s")
        yield Figure(part="captioning", what=f"{what}: a batch", value=1e3 / rate, unit="ms")
    ray.kill(captions)


def _service(bench: _Bench) -> Iterator[Figure]:
    found = benchmark_serve(
        BenchmarkServeConfig(
            model=bench.model,
            images=bench.pictures,
            source_options=SourceConfig(limit=bench.size.pictures),
            concurrency=bench.size.clients,
            seconds=max(1.0, bench.seconds),
        )
    )
    yield Figure(part="service", what="Captioner alone", value=found.limit, unit="images/s")
    for load in found.loads:
        name = f"{load.clients} clients"
        rate, latency = load.images_per_second, load.p95_ms
        yield Figure(part="service", what=name, value=rate, unit="images/s")
        yield Figure(part="service", what=f"{name}, 95 % answered in", value=latency, unit="ms")
    yield Figure(part="service", what="best, of the Captioner alone", value=found.ratio, unit="")


_PARTS: dict[GpuPart, Callable[[_Bench], Iterator[Figure]]] = {
    "extraction": _extraction,
    "training": _training,
    "captioning": _captioning,
    "service": _service,
}


def _encoded(sample: pa.Table) -> list[bytes]:
    return [data for data in sample["bytes"].to_pylist() if data]
