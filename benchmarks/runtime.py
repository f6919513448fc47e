"""How fast an encoder's network is on this machine's CPU, alone: eager in either layout, and compiled.

Seconds are those that the processor worked for it, by thread: what else runs on the machine does not count.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.config import BenchmarkRuntimeConfig
from benchmarks.measurement import Measurement, Row
from captioner.artifacts.manifests import Record
from captioner.encoders.encoder import Encoder
from captioner.encoders.family import family_of
from captioner.encoders.runtime import compiled, example, rates


class NetworkRate(Record):
    """One network in one arithmetic on so many threads, with batches of one size."""

    encoder: str
    compute: str
    threads: int
    batch: int
    eager_nchw: float
    """Images per second with each channel's pixels side by side."""
    eager: float
    """With each pixel's channels side by side (channels-last), as encoders run."""
    compiled: float
    compile_seconds: float
    """Of this process, the C++ compiler's left out."""
    cosine: float
    """Of compiled and float32 eager outputs, the least over images and outputs."""


class RuntimeBenchmark(Measurement):
    """Rates of the network alone."""

    rates: tuple[NetworkRate, ...]

    def table(self) -> str:
        names = ("compute", "threads", "batch", "eager_nchw", "eager", "compiled", "cosine")
        lines = [" ".join(f"{name:>11}" for name in names)]
        for one in self.rates:
            cells = (getattr(one, name) for name in names)
            lines.append(
                " ".join(
                    f"{cell:11.5g}" if isinstance(cell, float) else f"{cell:>11}" for cell in cells
                )
            )
        return "\n".join([self.rates[0].encoder, *lines])

    def rows(self) -> Sequence[Row]:
        return [one.model_dump() for one in self.rates]


def benchmark_runtime(config: BenchmarkRuntimeConfig) -> RuntimeBenchmark:
    """Measure the network in every arithmetic, number of threads and size of batch that ``config`` names.

    Raises:
        ConfigError, ModelError: as in extraction.
    """
    family, _ = family_of(config.encoder.name)
    tensors, _ = family.weights(config.encoder)
    exact = Encoder(family.spec(config.encoder, tensors, "float32"), tensors)
    found = []
    for compute in config.computes:
        spec = family.spec(config.encoder, tensors, compute)
        encoder = exact if compute == "float32" else Encoder(spec, tensors)
        other = Encoder(spec, tensors).network.to(memory_format=torch.contiguous_format)
        for threads in config.threads:
            torch.set_num_threads(threads)
            for batch in config.batches:
                pixels = example(encoder, batch)
                begun = time.process_time()
                fast = compiled(encoder.network, pixels)
                start = time.process_time() - begun
                networks: dict[str, Callable[[Tensor], Any]] = {
                    "eager_nchw": partial(_contiguous, other),
                    "eager": encoder.network,
                    "compiled": fast,
                }
                found.append(
                    NetworkRate(
                        encoder=spec.title,
                        compute=compute,
                        threads=threads,
                        batch=batch,
                        cosine=_cosine(exact.network, fast, pixels),
                        compile_seconds=start,
                        **rates(networks, pixels, partial(_seconds, threads)),
                    )
                )
    return RuntimeBenchmark(rates=tuple(found))


def _seconds(threads: int) -> float:
    return time.process_time() / threads


def _contiguous(network: Any, pixels: Tensor) -> Any:
    return network(pixels.contiguous())


@torch.inference_mode()
def _cosine(exact: Any, network: Any, pixels: Tensor) -> float:
    pairs = zip(exact(pixels.float()), network(pixels), strict=True)
    return min(
        float(functional.cosine_similarity(wanted.flatten(1), found.float().flatten(1)).min())
        for wanted, found in pairs
    )
