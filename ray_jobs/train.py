"""Train a decoder on a feature store, with DDP over Ray Train workers.

python -m ray_jobs.train --features runs/flickr8k/features --output runs/flickr8k/model --num-workers 2
"""

from captioner.config import TrainConfig
from captioner.presets import PRESETS
from captioner.runtime import command_line, following
from captioner.training.run import run_training


def train(config: TrainConfig) -> str:
    run_training(config)
    return following.command(
        *("evaluate", "--features", config.features, "--model", config.output),
        *("--output", following.free_place(config.output, "report")),
    )


def main() -> None:
    command_line.run(train, TrainConfig, presets=PRESETS)


if __name__ == "__main__":
    main()
