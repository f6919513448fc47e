"""Measure a stage on this machine or cluster.

python -m ray_jobs.benchmark extract --source my_photos/ --images 2000 --json extract.json
"""

import sys

from captioner import cli, storage
from captioner.benchmark import benchmark_extract
from captioner.config import BenchmarkExtractConfig
from captioner.errors import ConfigError

STAGES = ("extract",)


def extract(config: BenchmarkExtractConfig) -> None:
    result = benchmark_extract(config)
    print(result.table())
    if config.json_file:
        storage.write_bytes(config.json_file, result.model_dump_json(indent=1).encode())


def main() -> None:
    stage = sys.argv.pop(1) if len(sys.argv) > 1 and not sys.argv[1].startswith("-") else None
    if stage not in STAGES:
        cli.fail(str(ConfigError(f"benchmark: {stage!r} is not one of {', '.join(STAGES)}")))
    cli.run(extract, BenchmarkExtractConfig)


if __name__ == "__main__":
    main()
