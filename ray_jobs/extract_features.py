"""Extract features of every image of a source into a feature store.

python -m ray_jobs.extract_features --source shapes --output runs/shapes/features --encoder.weights random
"""

from captioner.config import ExtractConfig
from captioner.features.extract import extract
from captioner.runtime import command_line, following


def main() -> None:
    command_line.run(lambda config: following.after(config.output, extract(config)), ExtractConfig)


if __name__ == "__main__":
    main()
