"""How fast decoder and encoder learn on pictures, how long they wait for them, and what loading them takes."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from benchmarks.config import BenchmarkFinetuneConfig
from benchmarks.measurement import Measurement, Row
from benchmarks.train import measure_worker
from benchmarks.watch import Watch
from captioner import storage
from captioner.config import FinetuneConfig
from captioner.runtime.cluster import ACTOR_CPUS, num_cpus, num_gpus, start_ray
from captioner.sources import open_source
from captioner.sources.captioned import captioned
from captioner.training.finetune import write_captions
from captioner.training.finetune_worker import FinetuneWorker
from captioner.training.fit import plain_interrupts


class FinetuneBenchmark(Measurement):
    """What ``benchmark_finetune`` found; rates include the loading, the steps and the exchange between them."""

    cpus: int
    gpus: int
    """Of the cluster."""
    pictures: int
    """Of the train split."""
    global_batch: int
    """Captions per optimizer step."""
    stages: int
    steps: int
    compute: str
    """float32 or bfloat16."""
    captions_per_second: float
    steps_per_second: float
    data_wait_fraction: float
    """Share of the time in which the worker waited for its pictures."""
    in_memory_captions_per_second: float
    """The same loop over the same batches, held as tensors; nothing is loaded beside it."""
    peak_memory_bytes: int
    """Of the worker, its libraries included."""
    peak_loader_bytes: int
    """Of the largest process that reads and loads."""
    peak_object_store_bytes: int

    def table(self) -> str:
        ratio = self.captions_per_second / self.in_memory_captions_per_second
        return (
            f"{self.cpus} CPUs, {self.gpus} GPUs, {self.pictures:,} pictures, global batch {self.global_batch}, "
            f"{self.stages} stages learn, {self.steps} steps, {self.compute}\n\n"
            f"{self.captions_per_second:,.0f} captions/s, {self.data_wait_fraction:.1%} waiting; in memory "
            f"{self.in_memory_captions_per_second:,.0f}, ratio {ratio:.2f}\n"
            f"peak GiB: worker {self.peak_memory_bytes / 2**30:.2f}, "
            f"largest loader {self.peak_loader_bytes / 2**30:.2f}, "
            f"object store {self.peak_object_store_bytes / 2**30:.2f}"
        )

    def rows(self) -> Sequence[Row]:
        return [self.model_dump()]


def benchmark_finetune(config: BenchmarkFinetuneConfig) -> FinetuneBenchmark:
    """Finetune a number of steps with one worker; nothing is published.

    Raises:
        ModelError: the model cannot be read.
        SourceError: the source has no captions in splits train and validation.
    """
    settings = FinetuneConfig(
        model=storage.absolute(config.model),
        source=config.source,
        source_options=config.source_options,
        output="unused",
        stages=config.stages,
        global_batch=config.global_batch,
    )
    source = open_source(settings.source, settings.source_options, limits=settings.limits)
    _, captions = captioned(source, ("train", "validation"))
    start_ray()
    gpu = num_gpus() > 0
    watch = Watch()
    with tempfile.TemporaryDirectory() as folder, watch:
        table = storage.join(folder, "captions.parquet")
        write_captions(table, captions)
        trainer = TorchTrainer(
            _measure_worker,
            train_loop_config={
                "config": settings.model_dump_json(),
                "captions": table,
                "source": ray.put(source),
                "messages": None,
                "steps": config.steps,
            },
            scaling_config=ScalingConfig(
                num_workers=1,
                use_gpu=gpu,
                resources_per_worker={"CPU": ACTOR_CPUS, **({"GPU": 1} if gpu else {})},
            ),
            run_config=RunConfig(name="benchmark", storage_path=str(Path(folder))),
        )
        with plain_interrupts():
            found: dict[str, Any] = trainer.fit().return_value
    return FinetuneBenchmark(
        cpus=num_cpus(),
        gpus=num_gpus(),
        pictures=len(captions["train"]),
        global_batch=config.global_batch,
        stages=config.stages,
        steps=config.steps,
        peak_loader_bytes=watch.memory.task_worker,
        peak_object_store_bytes=watch.object_store,
        **found,
    )


def _measure_worker(arguments: dict[str, Any]) -> dict[str, Any]:
    return measure_worker(FinetuneWorker(arguments), arguments["steps"])
