"""Score a model on one split of a feature store.

python -m ray_jobs.evaluate --features runs/flickr8k/features --model runs/flickr8k/model \
    --split validation --output runs/flickr8k/report
"""

from captioner.config import EvaluateConfig
from captioner.evaluation.evaluate import evaluate, score_table
from captioner.runtime import command_line


def main() -> None:
    command_line.run(lambda config: print(score_table(evaluate(config))), EvaluateConfig)


if __name__ == "__main__":
    main()
