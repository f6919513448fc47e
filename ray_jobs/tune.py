"""Search hyperparameters with Ray Tune and ASHA; publish the best trial's model.

python -m ray_jobs.tune --features runs/flickr8k/features --output runs/flickr8k/search --space notebook --max-epochs 10
"""

from captioner.config import TuneConfig
from captioner.runtime import command_line
from captioner.tuning.search import run_search


def main() -> None:
    command_line.run(lambda config: print(run_search(config).table()), TuneConfig)


if __name__ == "__main__":
    main()
