"""Publish a model on the Hugging Face hub, with a model card.

captioner push --model runs/flickr8k/model --report runs/flickr8k/report --repo org/name
"""

from captioner.config import PushConfig
from captioner.evaluation.push import push
from captioner.runtime import command_line


def main() -> None:
    command_line.run(lambda config: print(push(config)), PushConfig)


if __name__ == "__main__":
    main()
