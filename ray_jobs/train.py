"""Train a decoder on a feature store, with DDP over Ray Train workers.

python -m ray_jobs.train --features runs/flickr8k/features --output runs/flickr8k/model --num-workers 2
"""

from captioner.config import TrainConfig
from captioner.presets import PRESETS
from captioner.runtime import command_line
from captioner.training.run import run_training


def main() -> None:
    command_line.run(run_training, TrainConfig, presets=PRESETS)


if __name__ == "__main__":
    main()
