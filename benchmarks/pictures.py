"""Generated JPEGs that are as large as ImageNet's and as hard to load, with captions."""

import csv
import random
from pathlib import Path

import numpy as np
from PIL import Image

_SIZE = (500, 375)
# Of the noise that makes the files some 110 kB large, ImageNet's mean.
_GRAIN = 28.0
_QUALITY = 90
_WORDS = 3000
_LENGTHS = (7, 15)  # words of a caption


def write_pictures(folder: Path, count: int, captions: int) -> None:
    """Write so many pictures, and beside them a table with so many captions of each."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    choose = random.Random(0)
    words = [_word(number) for number in range(_WORDS)]
    # As in a language, few words make most of what is said.
    weights = [1 / (number + 3) for number in range(_WORDS)]
    with (folder / "captions.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "caption"])
        for number in range(count):
            name = f"{number:06d}.jpg"
            _picture(generator).save(folder / name, quality=_QUALITY)
            for _ in range(captions):
                said = choose.choices(words, weights, k=choose.randint(*_LENGTHS))
                table.writerow([name, " ".join(said)])


def _picture(generator: np.random.Generator) -> Image.Image:
    coarse = generator.integers(0, 256, (6, 8, 3), np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize(_SIZE, Image.Resampling.BICUBIC), np.float32)
    grain = generator.normal(0, _GRAIN, smooth.shape[:2])[..., None]
    return Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8))


def _word(number: int) -> str:
    """Letters alone, another word for each number."""
    letters = []
    number += 26
    while number:
        number, letter = divmod(number, 26)
        letters.append(chr(ord("a") + letter))
    return "".join(letters)
