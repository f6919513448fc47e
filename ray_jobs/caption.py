"""Caption every image of a collection.

python -m ray_jobs.caption --images my_photos/ --model runs/flickr8k/model --output runs/my_captions
"""

from captioner.captioning.collection import caption_collection
from captioner.config import CaptionConfig
from captioner.runtime import command_line, following


def caption(config: CaptionConfig) -> str:
    caption_collection(config)
    return following.serve(config.model, config.decode.prompt)


def main() -> None:
    command_line.run(caption, CaptionConfig)


if __name__ == "__main__":
    main()
