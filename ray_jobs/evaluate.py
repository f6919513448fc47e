"""Score a model on one split of a feature store.

python -m ray_jobs.evaluate --features runs/flickr8k/features --model runs/flickr8k/model \
    --split validation --output runs/flickr8k/report
"""

from captioner import cli
from captioner.config import EvaluateConfig
from captioner.evaluation import evaluate, score_table


def main() -> None:
    cli.run(lambda config: print(score_table(evaluate(config))), EvaluateConfig)


if __name__ == "__main__":
    main()
