"""Let a trained model's decoder and the last stages of its encoder go on learning, on the pictures themselves.

python -m ray_jobs.finetune --model runs/flickr8k/model --source flickr8k --output runs/flickr8k/finetuned
"""

from captioner.config import FinetuneConfig
from captioner.runtime import command_line, following
from captioner.training.finetune import run_finetuning


def finetune(config: FinetuneConfig) -> str:
    run_finetuning(config)
    return following.command(
        *("evaluate", "--source", config.source, "--model", config.output),
        *("--output", following.free_place(config.output, "report")),
    )


def main() -> None:
    command_line.run(finetune, FinetuneConfig)


if __name__ == "__main__":
    main()
