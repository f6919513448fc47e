"""Pictures of a report: a grid of captioned images, the best and the worst of them, and where the decoder looked."""

import logging
from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np

from captioner import storage
from captioner.captioning.captioner import Captioner
from captioner.config import DecodeConfig
from captioner.errors import CaptionerError
from captioner.images.load import SIDE, load_image
from captioner.plots import attention_maps, best_and_worst, caption_grid
from captioner.sources import read_image

logger = logging.getLogger(__name__)

GRID_IMAGES = 16
BEST_AND_WORST = 10

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


class Pictures(Sequence[Pixels]):
    """Images by their URIs, decoded when asked for: uint8 RGB [224, 224, 3] each.

    Features outlive the photographs they were made from: one that can no longer be read is a grey square.
    """

    def __init__(self, uris: Sequence[str]):
        self.uris = uris
        self.missing: dict[str, str] = {}
        """Why, by URI."""

    def __len__(self) -> int:
        return len(self.uris)

    @overload
    def __getitem__(self, index: int) -> Pixels: ...
    @overload
    def __getitem__(self, index: slice) -> "Pictures": ...
    def __getitem__(self, index: int | slice) -> "Pixels | Pictures":
        if isinstance(index, slice):
            return Pictures(self.uris[index])
        uri = self.uris[index]
        try:
            return load_image(read_image(uri))
        except CaptionerError as error:
            self.missing[uri] = str(error)
            return np.full((SIDE, SIDE, 3), 224, np.uint8)


def draw_report(
    uris: Sequence[str],
    captions: Sequence[str],
    references: Sequence[Sequence[str]],
    cider: Sequence[float],
    captioner: Captioner,
    decode: DecodeConfig,
    *,
    attention_images: int,
    seed: int,
) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the PNG files of a report.

    Args:
        uris, captions, references, cider: one of each per image.
        attention_images: images whose attention is drawn, if the decoder looks at places.
        seed: of the choice of images.
    """
    pictures = Pictures(uris)
    chosen = np.random.default_rng(seed).permutation(len(uris))[:GRID_IMAGES].tolist()
    yield (
        "grid.png",
        caption_grid(
            [pictures[row] for row in chosen],
            [captions[row] for row in chosen],
            [references[row] for row in chosen],
        ),
    )
    yield (
        "best_and_worst.png",
        best_and_worst(pictures, captions, references, cider, count=BEST_AND_WORST, columns=5),
    )
    looks = captioner.model.decoder.attends
    for number, row in enumerate(chosen[:attention_images] if looks else ()):
        pixels = pictures[row]
        if uris[row] in pictures.missing:
            continue
        (found,) = captioner.caption_pixels(pixels[None], decode)
        if found.attention is not None and found.text:
            maps = attention_maps(pixels, found.text.split(), found.attention)
            yield storage.join("attention", f"{number}.png"), maps
    if pictures.missing:
        first = next(iter(pictures.missing.values()))
        logger.warning("%d of the report's photographs are grey: %s", len(pictures.missing), first)
