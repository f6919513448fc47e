"""How fast decoders train, how long they wait for data, and what data-parallel workers and streaming cost."""

import logging
import resource
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import ray.train
import torch
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from benchmarks.config import BenchmarkTrainConfig
from benchmarks.measurement import Measurement, Row
from captioner.artifacts.feature_store import FeatureStore
from captioner.artifacts.manifests import Record
from captioner.config import DecoderKind, TextConfig, TrainConfig
from captioner.decoders import decoder_class
from captioner.errors import ConfigError
from captioner.runtime.cluster import num_cpus, num_gpus, start_ray
from captioner.text import Vocabulary, clean
from captioner.training.data import Batch, on_device
from captioner.training.decoder_worker import DecoderWorker
from captioner.training.fit import plain_interrupts
from captioner.training.history import Stopwatch
from captioner.training.steps import train_step
from captioner.training.worker import Worker

logger = logging.getLogger(__name__)

# Steps before the clock starts: libraries choose and compile their kernels in the first ones.
_WARM_UP = 5


class TrainRate(Record):
    """One decoder, one ingest, one number of workers; rates are over all workers."""

    decoder: str
    ingest: str
    workers: int
    compute: str
    """float32 or bfloat16."""
    captions_per_second: float
    steps_per_second: float
    data_wait_fraction: float
    """Share of the time in which the first worker waited for its batches."""
    in_memory_captions_per_second: float
    """The same loop over the same batches, held as tensors."""
    peak_memory_bytes: int
    """Of the first worker, its libraries included."""


class TrainBenchmark(Measurement):
    """What ``benchmark_train`` found."""

    cpus: int
    gpus: int
    """Of the cluster."""
    vocabulary: int
    """Words."""
    width: int
    """Of the decoders."""
    global_batch: int
    """Captions per optimizer step."""
    steps: int
    rates: list[TrainRate]

    def table(self) -> str:
        lines = [
            f"{self.cpus} CPUs, {self.gpus} GPUs, {self.vocabulary:,} words, global batch {self.global_batch}, "
            f"{self.steps} steps each",
            "",
            f"{'decoder':20}{'ingest':11}{'workers':>8}{'captions/s':>12}{'waiting':>9}{'in memory':>11}"
            f"{'ratio':>7}{'peak GiB':>10}",
        ]
        for rate in self.rates:
            ratio = rate.captions_per_second / rate.in_memory_captions_per_second
            lines.append(
                f"{rate.decoder:20}{rate.ingest:11}{rate.workers:8}{rate.captions_per_second:12,.0f}"
                f"{rate.data_wait_fraction:9.1%}{rate.in_memory_captions_per_second:11,.0f}{ratio:7.2f}"
                f"{rate.peak_memory_bytes / 2**30:10.2f}"
            )
        return "\n".join(lines)

    def rows(self) -> Sequence[Row]:
        return [self.model_dump(exclude={"rates"}) | rate.model_dump() for rate in self.rates]


def benchmark_train(config: BenchmarkTrainConfig) -> TrainBenchmark:
    """Train a number of steps with every decoder, ingest and number of workers asked for; nothing is published.

    Raises:
        StoreError: the features lack what a decoder reads.
        ConfigError: the cluster is too small for the workers.
    """
    store = FeatureStore.open(config.features)
    for kind in config.decoders:
        store.require("train", decoder_class(kind).columns, captions=True)
    vocabulary = vocabulary_of(store, config.text)
    start_ray()
    there = num_gpus() or num_cpus()
    if there < max(config.workers):
        raise ConfigError(f"workers: {max(config.workers)} are more than the cluster's {there}")
    rates = [
        _measure(config, kind, ingest, workers, vocabulary)
        for kind in config.decoders
        for ingest in config.ingest
        for workers in config.workers
    ]
    return TrainBenchmark(
        cpus=num_cpus(),
        gpus=num_gpus(),
        vocabulary=len(vocabulary),
        width=config.decoder.width,
        global_batch=config.global_batch,
        steps=config.steps,
        rates=rates,
    )


def vocabulary_of(store: FeatureStore, text: TextConfig) -> Vocabulary:
    """The words of the train split."""
    words = (
        clean(caption, text.rules)
        for captions in store.captions("train").values()
        for caption in captions
    )
    return Vocabulary.build(words, text.min_count, text.rules)


def _measure(
    config: BenchmarkTrainConfig,
    kind: DecoderKind,
    ingest: Literal["resident", "streaming"],
    workers: int,
    vocabulary: Vocabulary,
) -> TrainRate:
    logger.info("measuring %s, %s, %d worker(s)", kind, ingest, workers)
    settings = TrainConfig(
        features=FeatureStore.open(config.features).uri,
        output="unused",
        decoder=config.decoder.model_copy(update={"kind": kind}),
        text=config.text,
        global_batch=config.global_batch,
        group_captions=config.group_captions,
        num_workers=workers,
        ingest=ingest,
    )
    (found,) = measure_steps([settings], vocabulary, config.steps)
    return TrainRate(decoder=kind, ingest=ingest, workers=workers, **found)


def measure_steps(
    settings: Sequence[TrainConfig], vocabulary: Vocabulary, steps: int
) -> list[dict[str, Any]]:
    """Train so many steps with each of some settings, one after the other in the same workers.

    Args:
        settings: all with as many workers.

    Returns:
        what ``TrainRate`` holds of each.
    """
    gpu = num_gpus() > 0
    with tempfile.TemporaryDirectory() as folder:
        trainer = TorchTrainer(
            _measure_worker,
            train_loop_config={
                "configs": [one.model_dump_json() for one in settings],
                "vocabulary": vocabulary.save_json(),
                "steps": steps,
            },
            scaling_config=ScalingConfig(
                num_workers=settings[0].num_workers,
                use_gpu=gpu,
                resources_per_worker=None if gpu else {"CPU": 1},
            ),
            run_config=RunConfig(name="benchmark", storage_path=str(Path(folder))),
        )
        with plain_interrupts():
            found: list[dict[str, Any]] = trainer.fit().return_value
        return found


def _measure_worker(arguments: dict[str, Any]) -> list[dict[str, Any]]:
    vocabulary = Vocabulary.from_json(arguments["vocabulary"])
    found = [
        measure_worker(
            DecoderWorker(TrainConfig.model_validate_json(one), vocabulary, None),
            arguments["steps"],
        )
        for one in arguments["configs"]
    ]
    # Everybody reports, or the others would be taken down while they still exchange gradients.
    ray.train.report({})
    return found


def measure_worker(worker: Worker, most: int) -> dict[str, Any]:
    """Figures of a worker's first steps, as they come and from memory; all workers call it together."""
    epoch = worker.train.epoch(0)
    steps = replace(epoch, plan=epoch.plan[: most + _WARM_UP])
    captions = sum(int((share >= 0).sum()) for step in steps.plan[_WARM_UP:] for share in step)
    worker.model.train()
    batches = on_device(iter(steps), worker.device)
    _run(worker, islice(batches, _WARM_UP))
    timer = Stopwatch(batches)
    started = time.perf_counter()
    _run(worker, timer)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    # Read again: had they been kept in the loop above, its memory would be theirs, too.
    held = list(steps)[_WARM_UP:]
    # Each worker read in its own time: the clock starts when all are done.
    worker.reduce(torch.zeros(1))
    started = time.perf_counter()
    _run(worker, (batch.to(worker.device) for batch in held))
    in_memory = time.perf_counter() - started
    return {
        "compute": worker.compute,
        "captions_per_second": captions / seconds,
        "steps_per_second": len(held) / seconds,
        "data_wait_fraction": timer.waited / seconds,
        "in_memory_captions_per_second": captions / in_memory,
        "peak_memory_bytes": peak,
    }


def _run(worker: Worker, batches: Iterable[Batch]) -> None:
    """As in training, where a GPU is waited for at the end of an epoch alone."""
    sums = torch.zeros(2, dtype=torch.float64, device=worker.device)
    for batch in batches:
        loss, other = train_step(
            worker.model,
            worker.state.optimizer,
            batch,
            seed=(worker.rank,),
            workers=worker.workers,
            config=worker.config,
            compute=worker.compute,
        )
        sums += torch.stack([loss.double(), other.double()])
    sums.cpu()
