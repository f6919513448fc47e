"""Other views of decoded pictures, for augmentation in training: the mirror image and random crops.

Crops are those of Szegedy et al., "Going Deeper with Convolutions" (2015), as in torchvision's ``RandomResizedCrop``,
but larger: what a caption speaks of should stay in the picture.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from captioner.artifacts.schema import MIRRORED, view_names
from captioner.images.load import SIDE, Pixels

_AREA = (0.45, 1.0)  # share of the picture, least and most
_RATIO = 1.22  # most of width / height, and of its inverse


def other_views(
    images: Pixels, image_ids: Sequence[str], *, mirrored: bool, crops: int
) -> Iterator[tuple[str, Pixels]]:
    """What ``view_names`` names, in its order, with the pixels.

    A crop depends on the image's id and the crop's number alone, so that a continued extraction makes the same ones.
    Where mirror images are wanted, every other crop is mirrored, too.

    Args:
        images: uint8 RGB [N, 224, 224, 3].
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
    """A random part of a decoded picture, enlarged to its size: uint8 RGB [224, 224, 3]."""
    seed = hashlib.sha256(f"{number} {image_id}".encode()).digest()
    generator = np.random.default_rng(int.from_bytes(seed[:8], "little"))
    area = generator.uniform(*_AREA)
    ratio = math.exp(generator.uniform(-math.log(_RATIO), math.log(_RATIO)))
    width, height = (SIDE * min(1.0, math.sqrt(part)) for part in (area * ratio, area / ratio))
    left, top = generator.uniform(0, SIDE - width), generator.uniform(0, SIDE - height)
    box = (left, top, left + width, top + height)
    resized = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BILINEAR, box)
    return np.asarray(resized)
