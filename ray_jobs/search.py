"""Find the images of a feature store that are most like a picture.

captioner search --features runs/flickr8k/features --image dog.jpg -k 20
"""

from captioner.config import SearchConfig
from captioner.features.likeness import find_alike
from captioner.runtime import command_line


def show(config: SearchConfig) -> None:
    for row in find_alike(config).to_pylist():
        print(f"{row['cosine']:.4f}  {row['image_id']}")


def main() -> None:
    command_line.run(show, SearchConfig)


if __name__ == "__main__":
    main()
