"""Search hyperparameters with Ray Tune and ASHA; publish the best trial's model.

python -m ray_jobs.tune --features runs/flickr8k/features --output runs/flickr8k/search --space notebook --max-epochs 10
"""

from captioner import storage
from captioner.config import TuneConfig
from captioner.runtime import command_line, following
from captioner.runtime.screen import SCREEN
from captioner.tuning.publish import MODEL
from captioner.tuning.search import run_search


def tune(config: TuneConfig) -> str:
    result = run_search(config)
    SCREEN.show(result.table())
    return following.serve(storage.join(config.output, MODEL))


def main() -> None:
    command_line.run(tune, TuneConfig)


if __name__ == "__main__":
    main()
