"""Score a model on one split of a feature store.

python -m ray_jobs.evaluate --features runs/flickr8k/features --model runs/flickr8k/model \
    --split validation --output runs/flickr8k/report
"""

from captioner.config import EvaluateConfig
from captioner.evaluation.evaluate import evaluate, score_table
from captioner.runtime import command_line, following
from captioner.runtime.screen import SCREEN


def score(config: EvaluateConfig) -> str:
    SCREEN.show(score_table(evaluate(config)))
    return following.serve(config.model, config.decode.prompt)


def main() -> None:
    command_line.run(score, EvaluateConfig)


if __name__ == "__main__":
    main()
