"""Bytes -> one 224x224 RGB array, or a reason for refusing them: the one decoder, used offline and online."""

import io
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from captioner.config import ImageLimits
from captioner.errors import ImageError, ImageTooLargeError, ImageTypeError

SIDE = 224

# First bytes -> Pillow's name of the format. WebP is a RIFF file, told apart by its bytes 8 to 12.
_SIGNATURES = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"RIFF": "WEBP",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
}

# EXIF orientation -> what makes the picture upright.
_TURNS: dict[object, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# What Pillow raises on damaged images of these formats; tests/fuzz_images.py finds any other.
_PILLOW_ERRORS = (OSError, SyntaxError, ValueError, TypeError, struct.error)

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


def sniff_format(data: bytes) -> str | None:
    """Content type (``image/jpeg`` ...) by the first bytes, or None for anything that is not accepted."""
    name = _format_name(data)
    return name and f"image/{name.lower()}"


def load_image(data: bytes, limits: ImageLimits | None = None) -> Pixels:
    """Decode the first frame of an image: upright, over white where transparent, squashed to 224x224.

    The plain resize, aspect ratio not kept, is what the notebook's features were made with. It is Pillow's bilinear
    filter, which widens with the reduction (antialiasing).

    Args:
        data: JPEG, PNG, WebP, GIF, BMP or TIFF, recognised by content.

    Returns:
        uint8 RGB [224, 224, 3].

    Raises:
        ImageTypeError: not one of these formats.
        ImageTooLargeError: over the byte limit, or over the pixel limit by its header, before any pixel is decoded.
        ImageError: empty, truncated or damaged.
    """
    return np.asarray(_decode(data, limits or ImageLimits(), lambda size: (SIDE, SIDE)))


def load_thumbnail(data: bytes, limits: ImageLimits | None, side: int) -> Image.Image:
    """The same picture for people: its proportions kept, at most ``side`` pixels wide and high, RGB.

    Raises:
        ImageError: as ``load_image``.
    """

    def fit(size: tuple[int, int]) -> tuple[int, int]:
        scale = min(1.0, side / max(size))
        return max(1, round(scale * size[0])), max(1, round(scale * size[1]))

    return _decode(data, limits or ImageLimits(), fit)


def _decode(
    data: bytes, limits: ImageLimits, target: Callable[[tuple[int, int]], tuple[int, int]]
) -> Image.Image:
    """``target`` gives the size, before the picture is turned upright, from the size in the header."""
    if not data:
        raise ImageError("empty file")
    if len(data) > limits.max_bytes:
        raise ImageTooLargeError(f"{len(data)} bytes, over the limit of {limits.max_bytes}")
    name = _format_name(data)
    if name is None:
        raise ImageTypeError("not a JPEG, PNG, WebP, GIF, BMP or TIFF image")
    try:
        image = Image.open(io.BytesIO(data), formats=[name])
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        # Pillow's own limit, which comes first only where ours is set above it.
        raise ImageTooLargeError("more pixels than Pillow decodes") from error
    except _PILLOW_ERRORS as error:
        raise ImageError(f"damaged {name} header") from error
    with image:
        width, height = image.size
        if width * height > limits.max_pixels:
            raise ImageTooLargeError(
                f"{width}x{height} pixels, over the limit of {limits.max_pixels} in all"
            )
        try:
            # libjpeg scales by 1/2, 1/4 or 1/8 while decoding. Kept at twice the target or more, that differs from the
            # full decode by 0.3 of 255 on average and takes a third of the time at 12 megapixels.
            size = target(image.size)
            image.draft(None, (2 * size[0], 2 * size[1]))
            image.load()
            return _resize(image, size)
        except _PILLOW_ERRORS as error:
            raise ImageError(f"truncated or damaged {name} data") from error


def _format_name(data: bytes) -> str | None:
    for signature, name in _SIGNATURES.items():
        if data.startswith(signature):
            return name if name != "WEBP" or data[8:12] == b"WEBP" else None
    return None


def _resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Reduced before it is turned and laid over white, so that a large image is copied as rarely as possible."""
    small = _eight_bit(image).resize(size, Image.Resampling.BILINEAR, reducing_gap=3.0)
    turn = _TURNS.get(_orientation(image))
    if turn is not None:
        small = small.transpose(turn)
    if small.mode in ("LA", "RGBA"):
        white = Image.new("RGBA", small.size, "white")
        small = Image.alpha_composite(white, small.convert("RGBA"))
    return small.convert("RGB")


def _orientation(image: Image.Image) -> object:
    # Pillow's exif_transpose also writes the remaining tags back, and fails on some that cameras write.
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except _PILLOW_ERRORS:
        return None


def _eight_bit(image: Image.Image) -> Image.Image:
    """In mode L, LA, RGB or RGBA, the only ones that resize interpolates as we want."""
    if image.mode in ("L", "RGB") and "transparency" in image.info:
        return image.convert("RGBA")
    if image.mode in ("L", "LA", "RGB", "RGBA"):
        return image
    if image.mode.startswith("I;16"):
        # The high byte, as Pillow reads 16-bit colours; its conversion of 16-bit greys clips them at 255 instead.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ImageError("32-bit samples, whose white is not defined")
    return image.convert("RGBA" if image.has_transparency_data else "RGB")
