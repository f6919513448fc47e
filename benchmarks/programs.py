"""The benchmarks by name, and what is done with the figures of each."""

import shlex
import sys
from collections.abc import Callable
from typing import Any

from benchmarks.config import (
    BenchmarkConfig,
    BenchmarkDriverConfig,
    BenchmarkExtractConfig,
    BenchmarkFinetuneConfig,
    BenchmarkGpuConfig,
    BenchmarkKeptConfig,
    BenchmarkRuntimeConfig,
    BenchmarkScoresConfig,
    BenchmarkServeConfig,
    BenchmarkSimulateConfig,
    BenchmarkTrainConfig,
)
from benchmarks.driver import benchmark_driver
from benchmarks.extract import benchmark_extract
from benchmarks.finetune import benchmark_finetune
from benchmarks.gpu_report import benchmark_gpu
from benchmarks.kept import benchmark_kept
from benchmarks.measurement import Measurement, append_rows
from benchmarks.runtime import benchmark_runtime
from benchmarks.scores import benchmark_scores
from benchmarks.serve import benchmark_serve
from benchmarks.simulate import benchmark_simulate
from benchmarks.train import benchmark_train
from captioner import storage
from captioner.runtime.screen import SCREEN

PROGRAMS: dict[str, tuple[Callable[[Any], Measurement], type[BenchmarkConfig]]] = {
    "driver": (benchmark_driver, BenchmarkDriverConfig),
    "extract": (benchmark_extract, BenchmarkExtractConfig),
    "gpu": (benchmark_gpu, BenchmarkGpuConfig),
    "kept": (benchmark_kept, BenchmarkKeptConfig),
    "runtime": (benchmark_runtime, BenchmarkRuntimeConfig),
    "finetune": (benchmark_finetune, BenchmarkFinetuneConfig),
    "train": (benchmark_train, BenchmarkTrainConfig),
    "scores": (benchmark_scores, BenchmarkScoresConfig),
    "serve": (benchmark_serve, BenchmarkServeConfig),
    "simulate": (benchmark_simulate, BenchmarkSimulateConfig),
}


def measure(name: str, config: BenchmarkConfig) -> None:
    """Run a benchmark, print its figures, and write them where ``config`` says."""
    measured = PROGRAMS[name][0](config)
    SCREEN.show(measured.table())
    if config.json_file:
        storage.write_bytes(config.json_file, measured.model_dump_json(indent=1).encode())
    if config.csv_file:
        command = shlex.join(["python", "-m", "ray_jobs.benchmark", name, *sys.argv[1:]])
        append_rows(config.csv_file, measured.rows(), command)
