"""Other views of loaded pictures, for augmentation in training: the mirror image and random crops.

Crops are those of Szegedy et al., "Going Deeper with Convolutions" (2015), as in torchvision's ``RandomResizedCrop``,
but larger: what a caption speaks of should stay in the picture.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from captioner.images.load import Pixels

MIRRORED = "_mirrored"

_AREA = (0.45, 1.0)  # share of the picture, least and most
_RATIO = 1.22  # most of width / height, and of its inverse


def view_names(mirrored: bool, crops: int) -> tuple[str, ...]:
    """What the feature columns of an image's other views have after their names: ``_mirrored``, ``_crop1`` ..."""
    return (MIRRORED,) * mirrored + tuple(f"_crop{number + 1}" for number in range(crops))


def other_views(
    images: Pixels, image_ids: Sequence[str], *, mirrored: bool, crops: int
) -> Iterator[tuple[str, Pixels]]:
    """What ``view_names`` names, in its order, with the pixels.

    A crop depends on the image's id and the crop's number alone, so that a continued extraction makes the same ones.
    Where mirror images are wanted, every other crop is mirrored, too.

    Args:
        images: uint8 RGB [N, rows, columns, 3].
    """
    for number, name in enumerate(view_names(mirrored, crops), 0 if mirrored else 1):
        if name == MIRRORED:
            yield name, np.ascontiguousarray(images[:, :, ::-1])
            continue
        cropped = np.stack(
            [
                crop(pixels, image_id, number)
                for pixels, image_id in zip(images, image_ids, strict=True)
            ]
        )
        if mirrored and number % 2:
            cropped = np.ascontiguousarray(cropped[:, :, ::-1])
        yield name, cropped


def crop(pixels: Pixels, image_id: str, number: int) -> Pixels:
    """A random part of a picture, enlarged to its size: uint8 RGB [rows, columns, 3]."""
    seed = hashlib.sha256(f"{number} {image_id}".encode()).digest()
    generator = np.random.default_rng(int.from_bytes(seed[:8], "little"))
    area = generator.uniform(*_AREA)
    ratio = math.exp(generator.uniform(-math.log(_RATIO), math.log(_RATIO)))
    rows, columns, _ = pixels.shape
    width = columns * min(1.0, math.sqrt(area * ratio))
    height = rows * min(1.0, math.sqrt(area / ratio))
    left, top = generator.uniform(0, columns - width), generator.uniform(0, rows - height)
    box = (left, top, left + width, top + height)
    resized = Image.fromarray(pixels).resize((columns, rows), Image.Resampling.BILINEAR, box)
    return np.asarray(resized)
