"""The benchmarks by name, and what is done with the figures of each."""

from collections.abc import Callable
from typing import Annotated, Any

from tyro.conf import subcommand

from benchmarks.config import (
    BenchmarkConfig,
    BenchmarkExtractConfig,
    BenchmarkScoresConfig,
    BenchmarkServeConfig,
    BenchmarkTrainConfig,
)
from benchmarks.extract import benchmark_extract
from benchmarks.measurement import Measurement, append_rows
from benchmarks.scores import benchmark_scores
from benchmarks.serve import benchmark_serve
from benchmarks.train import benchmark_train
from captioner import storage

AnyBenchmark = (
    Annotated[BenchmarkExtractConfig, subcommand("extract")]
    | Annotated[BenchmarkTrainConfig, subcommand("train")]
    | Annotated[BenchmarkScoresConfig, subcommand("scores")]
    | Annotated[BenchmarkServeConfig, subcommand("serve")]
)

_PROGRAMS: dict[type[BenchmarkConfig], Callable[[Any], Measurement]] = {
    BenchmarkExtractConfig: benchmark_extract,
    BenchmarkTrainConfig: benchmark_train,
    BenchmarkScoresConfig: benchmark_scores,
    BenchmarkServeConfig: benchmark_serve,
}


def measure(config: BenchmarkConfig) -> None:
    """Run a benchmark, print its figures, and write them where ``config`` says."""
    measured = _PROGRAMS[type(config)](config)
    print(measured.table())
    if config.json_file:
        storage.write_bytes(config.json_file, measured.model_dump_json(indent=1).encode())
    if config.csv_file:
        append_rows(config.csv_file, measured.rows())
