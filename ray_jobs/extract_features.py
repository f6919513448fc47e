"""Extract features of every image of a source into a feature store.

python -m ray_jobs.extract_features --source shapes --output runs/shapes/features --encoder.weights random
"""

from captioner import cli
from captioner.config import ExtractConfig
from captioner.features import extract


def main() -> None:
    cli.run(extract, ExtractConfig)


if __name__ == "__main__":
    main()
