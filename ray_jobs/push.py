"""Publish a model on the Hugging Face hub, with a model card.

captioner push --model runs/flickr8k/model --report runs/flickr8k/report --repo org/name
"""

from captioner.config import PushConfig
from captioner.evaluation.push import push
from captioner.runtime import command_line, following
from captioner.runtime.screen import SCREEN


def publish(config: PushConfig) -> str:
    uri = push(config)
    SCREEN.show(uri)
    return following.serve(uri)


def main() -> None:
    command_line.run(publish, PushConfig)


if __name__ == "__main__":
    main()
