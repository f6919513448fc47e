"""Publish a feature store that has grown, its older parts included, as one store; nothing is encoded again.

captioner compact --features runs/flickr8k/grown --output runs/flickr8k/whole
"""

from captioner.config import CompactConfig
from captioner.features.compact import compact
from captioner.runtime import command_line, following


def main() -> None:
    command_line.run(lambda config: following.after(config.output, compact(config)), CompactConfig)


if __name__ == "__main__":
    main()
