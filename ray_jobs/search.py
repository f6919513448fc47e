"""Find the images of a feature store that are most like a picture.

captioner search --features runs/flickr8k/features --image dog.jpg -k 20
"""

from captioner.config import SearchConfig
from captioner.features.likeness import find_alike
from captioner.runtime import command_line, following
from captioner.runtime.screen import SCREEN


def show(config: SearchConfig) -> str | None:
    found = find_alike(config)
    for row in found.rows.to_pylist():
        SCREEN.show(f"{row['cosine']:.4f}  {row['image_id']}")
    return following.after(found.uri, found.manifest)


def main() -> None:
    command_line.run(show, SearchConfig)


if __name__ == "__main__":
    main()
