"""Small pictures made on the fly."""

import io
import zlib

import numpy as np
from PIL import Image


def picture(number: int, kind: str = "JPEG", size: tuple[int, int] = (96, 72)) -> bytes:
    """A picture of coarse coloured blocks, another for every number."""
    blocks = np.random.default_rng(number).integers(0, 256, (3, 4, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST).save(file, kind)
    return file.getvalue()


def bomb(width: int = 60_000, height: int = 60_000) -> bytes:
    """A PNG of a few bytes whose header promises gigabytes of pixels."""
    data = bytearray(picture(0, "PNG"))
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)
