"""Measure a stage on this machine or cluster.

python -m ray_jobs.benchmark extract --source my_photos/ --images 2000 --json extract.json
python -m ray_jobs.benchmark resume --rows 10000000
python -m ray_jobs.benchmark train --features runs/flickr8k/features --json train.json
python -m ray_jobs.benchmark serve --model runs/flickr8k/model --images my_photos/ --json serve.json
python -m ray_jobs.benchmark scale --features runs/flickr8k/features --images-per-second 56 \\
    --decoded-per-second 697 --cpus 2
"""

import sys
from typing import Any

from benchmarks.config import (
    BenchmarkExtractConfig,
    BenchmarkResumeConfig,
    BenchmarkScaleConfig,
    BenchmarkServeConfig,
    BenchmarkTrainConfig,
)
from benchmarks.extract import benchmark_extract
from benchmarks.resume import benchmark_resume
from benchmarks.scale import benchmark_scale
from benchmarks.serve import benchmark_serve
from benchmarks.train import benchmark_train
from captioner import storage
from captioner.errors import ConfigError
from captioner.runtime import command_line

STAGES = {
    "extract": (benchmark_extract, BenchmarkExtractConfig),
    "resume": (benchmark_resume, BenchmarkResumeConfig),
    "train": (benchmark_train, BenchmarkTrainConfig),
    "scale": (benchmark_scale, BenchmarkScaleConfig),
    "serve": (benchmark_serve, BenchmarkServeConfig),
}


def main() -> None:
    if sys.argv[1:] in (["--help"], ["-h"]):
        print(f"{__doc__}\nStages: {', '.join(STAGES)}; each has --help.")
        return
    stage = sys.argv.pop(1) if len(sys.argv) > 1 and not sys.argv[1].startswith("-") else None
    if stage not in STAGES:
        command_line.fail(
            str(ConfigError(f"benchmark: {stage!r} is not one of {', '.join(STAGES)}"))
        )
    measure, config_type = STAGES[stage]

    def job(config: Any) -> None:
        result = measure(config)
        print(result.table())
        if config.json_file:
            storage.write_bytes(config.json_file, result.model_dump_json(indent=1).encode())

    command_line.run(job, config_type)


if __name__ == "__main__":
    main()
