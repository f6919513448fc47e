"""Bytes -> one 224x224 RGB array, or a reason for refusing them: the one decoder, used offline and online."""

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image, ImageFile, ImageOps

from captioner.config import ImageLimits
from captioner.errors import ImageError, ImageTooLargeError, ImageTypeError

SIDE = 224
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
CONTENT_TYPES = {
    "JPEG": "image/jpeg",
    "PNG": "image/png",
    "WEBP": "image/webp",
    "GIF": "image/gif",
    "BMP": "image/bmp",
    "TIFF": "image/tiff",
}
# What Pillow's decoders raise on hostile bytes (found by fuzzing; tests/fuzz_images.py).
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    OverflowError,
    EOFError,
    struct.error,
    zlib.error,
    MemoryError,
    Image.DecompressionBombError,
)

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


def decode_image(data: bytes, limits: ImageLimits | None = None) -> Pixels:
    """Decode the first frame of an image: upright, over white where transparent, squashed to 224x224.

    The plain resize, aspect ratio not kept, is what the seed's features and ImageNet's Keras weights were used with.

    Args:
        data: JPEG, PNG, WebP, GIF, BMP or TIFF, recognised by content.

    Returns:
        uint8 RGB [224, 224, 3].

    Raises:
        ImageTypeError: not one of these formats.
        ImageTooLargeError: over the byte limit, or over the pixel limit by its header, before any pixel is decoded.
        ImageError: empty, truncated or damaged.
    """
    limits = limits or ImageLimits()
    if not data:
        raise ImageError("empty file")
    if len(data) > limits.max_bytes:
        raise ImageTooLargeError(f"{len(data)} bytes, the limit is {limits.max_bytes}")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError:
        raise ImageTypeError(f"not an image of an accepted type ({', '.join(FORMATS)})") from None
    except _DECODER_ERRORS as error:
        raise ImageError(f"damaged image header: {_reason(error)}") from error
    with image:
        width, height = image.size
        if width * height > limits.max_pixels:
            raise ImageTooLargeError(
                f"{width}x{height} pixels, the limit is {limits.max_pixels} in all"
            )
        try:
            # JPEG can be decoded at a half, quarter or eighth of its size; twice the target keeps the resize exact
            # enough to leave embeddings unchanged for practical purposes, at a fraction of the time.
            image.draft("RGB", (2 * SIDE, 2 * SIDE))
            image.load()
            upright = ImageOps.exif_transpose(image)
            squashed = _rgb(upright).resize((SIDE, SIDE), Image.Resampling.BILINEAR, reducing_gap=3.0)
        except _DECODER_ERRORS as error:
            raise ImageError(f"truncated or damaged image: {_reason(error)}") from error
    return np.asarray(squashed)


def sniff_format(data: bytes) -> str | None:
    """Content type by content (``image/jpeg`` ...), or None for anything that is not accepted."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return CONTENT_TYPES[image.format or ""]
    except _DECODER_ERRORS:
        return None


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16") or image.mode == "I":
        # Pillow's own conversion clips 16 bits at 255 instead of scaling them.
        samples = np.asarray(image).astype(np.float32) / 257.0
        return Image.fromarray(np.clip(samples, 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        return Image.fromarray(np.clip(np.nan_to_num(np.asarray(image)), 0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        white = Image.new("RGBA", layers.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layers).convert("RGB")
    return image.convert("RGB")


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__


# A truncated file must be an error, never a picture with a grey half; this is Pillow's default, relied on here.
assert not ImageFile.LOAD_TRUNCATED_IMAGES
