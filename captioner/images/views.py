"""Other views of loaded pictures, for augmentation in training: the mirror image and random crops.

Crops are those of Szegedy et al., "Going Deeper with Convolutions" (2015), as in torchvision's ``RandomResizedCrop``,
but larger: what a caption speaks of should stay in the picture.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from captioner.images.load import Pixels

MIRRORED = "_mirrored"

_AREA = (0.45, 1.0)  # share of the picture, least and most
_RATIO = 1.22  # most of width / height, and of its inverse


class View(NamedTuple):
    """How another view comes of a picture."""

    name: str
    """What feature columns have after their names."""
    crop: int | None
    """Number of the crop; None: the whole picture."""
    is_mirrored: bool


def planned_views(mirrored: bool, crops: int) -> list[View]:
    """The mirror image, if asked for, then crops. Where mirror images are wanted, every other crop is mirrored, too."""
    whole = [View(MIRRORED, None, True)] * mirrored
    return whole + [
        View(f"_crop{number}", number, mirrored and number % 2 == 1)
        for number in range(1, crops + 1)
    ]


def view_names(mirrored: bool, crops: int) -> tuple[str, ...]:
    """What the feature columns of an image's other views have after their names: ``_mirrored``, ``_crop1`` ..."""
    return tuple(view.name for view in planned_views(mirrored, crops))


def other_views(
    images: Pixels, image_ids: Sequence[str], *, mirrored: bool, crops: int
) -> Iterator[tuple[str, Pixels]]:
    """What ``planned_views`` lists, in its order, with the pixels.

    A crop depends on the image's id and the crop's number alone, so that a continued extraction makes the same ones.

    Args:
        images: uint8 RGB [N, rows, columns, 3].
    """
    for view in planned_views(mirrored, crops):
        shown = images
        if view.crop is not None:
            pairs = zip(images, image_ids, strict=True)
            shown = np.stack([crop(pixels, name, view.crop) for pixels, name in pairs])
        yield view.name, np.ascontiguousarray(shown[:, :, ::-1]) if view.is_mirrored else shown


def view_of_epoch(
    pixels: Pixels, image_id: str, *, seed: int, epoch: int, crop: bool, mirror: bool
) -> Pixels:
    """What an epoch shows of a picture, decided by seed, epoch and id alone: uint8 RGB [rows, columns, 3].

    Args:
        crop: a random part of it.
        mirror: it or its mirror image.
    """
    generator = _generator(f"{seed} {epoch} {image_id}")
    mirrored = mirror and generator.random() < 0.5
    if crop:
        rows, columns, _ = pixels.shape
        pixels = _part(pixels, _random_box(generator, rows, columns))
    return np.ascontiguousarray(pixels[:, ::-1]) if mirrored else pixels


def crop(pixels: Pixels, image_id: str, number: int) -> Pixels:
    """A random part of a picture, enlarged to its size: uint8 RGB [rows, columns, 3]."""
    rows, columns, _ = pixels.shape
    return _part(pixels, crop_box(image_id, number, rows, columns))


def crop_box(
    image_id: str, number: int, rows: int, columns: int
) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of a crop within a picture of so many pixels."""
    return _random_box(_generator(f"{number} {image_id}"), rows, columns)


def _generator(key: str) -> np.random.Generator:
    seed = hashlib.sha256(key.encode()).digest()
    return np.random.default_rng(int.from_bytes(seed[:8], "little"))


def _part(pixels: Pixels, box: tuple[float, float, float, float]) -> Pixels:
    """A box of a picture, enlarged to its size."""
    rows, columns, _ = pixels.shape
    resized = Image.fromarray(pixels).resize((columns, rows), Image.Resampling.BILINEAR, box)
    return np.asarray(resized)


def _random_box(
    generator: np.random.Generator, rows: int, columns: int
) -> tuple[float, float, float, float]:
    area = generator.uniform(*_AREA)
    ratio = math.exp(generator.uniform(-math.log(_RATIO), math.log(_RATIO)))
    width = columns * min(1.0, math.sqrt(area * ratio))
    height = rows * min(1.0, math.sqrt(area / ratio))
    left, top = generator.uniform(0, columns - width), generator.uniform(0, rows - height)
    return left, top, left + width, top + height
