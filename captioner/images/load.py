"""Bytes -> pixels for an encoder's input, or a reason for refusing them: the one loader, used offline and online."""

import io
import math
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
from PIL import AvifImagePlugin, ExifTags, Image

from captioner.config import ImageLimits
from captioner.errors import ImageError, ImageTooLargeError, ImageTypeError

# Longest side of a thumbnail, in pixels.
THUMBNAIL_SIDE = 240
# Shortest side of a picture that keeps its proportions, in pixels: networks refuse thinner ones.
_LEAST = 32
_THUMBNAIL_QUALITY = 75

Filter = Literal["bilinear", "bicubic", "lanczos"]

ACCEPTED = "JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF or HEIC"
HEIF_EXTRA = "heif"
"""The package's extra that brings a loader of HEIC, which is not a part of Pillow."""

# First bytes -> Pillow's name of the format. WebP is a RIFF file, told apart by its bytes 8 to 12; AVIF and HEIC are
# containers that say their brands after the bytes 4 to 8.
_SIGNATURES = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"RIFF": "WEBP",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",  # BigTIFF
    b"MM\0+": "TIFF",
}

_BRANDS = dict.fromkeys((b"avif", b"avis"), "AVIF") | dict.fromkeys(
    (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"), "HEIF"
)
# Bytes a pixel at the peak, measured: pictures, canvases and copies that a loader holds at once.
_BYTES_PER_PIXEL = {
    "JPEG": 8,
    "PNG": 9,
    "WEBP": 17,
    "GIF": 6,
    "BMP": 8,
    "TIFF": 9,
    "AVIF": 14,
    "HEIF": 10,
}
# Whose headers are read in Python, without a decoder.
_PLAIN_HEADERS = frozenset(("JPEG", "PNG", "GIF", "BMP", "TIFF"))
# Of a progressive JPEG all coefficients, two bytes each, whatever the scale it is decoded at.
_BYTES_PER_COEFFICIENT = 2

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

_SWAPPING = {
    Image.Transpose.TRANSPOSE,
    Image.Transpose.ROTATE_270,
    Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90,
}
_FILTERS: dict[Filter, Image.Resampling] = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


def sniff_format(data: bytes) -> str | None:
    """Content type (``image/jpeg`` ...) by the first bytes, 64 of them, or None for anything that is not accepted."""
    name = _format_name(data)
    return name and ("image/heic" if name == "HEIF" else f"image/{name.lower()}")


@dataclass(frozen=True)
class Fit:
    """How a picture of any size becomes an encoder's input."""

    size: tuple[int, int]
    """Rows and columns."""
    resize: Literal["squash", "crop", "within"] = "squash"
    """squash: in the picture's proportions, which are not kept. crop: in those of the input. within: kept, and nothing
    cut, down to 32 pixels a side; the size is the largest, and pictures within it stay as they are."""
    crop_fraction: float = 1.0
    """Share of the sides of the largest centred box of those proportions that is shown."""
    filter: Filter = "bilinear"
    """Pillow's; all widen with the reduction (antialiasing)."""

    def turned(self) -> "Fit":
        """For a picture that lies on its side."""
        return replace(self, size=(self.size[1], self.size[0]))

    def made(self, width: int, height: int) -> tuple[int, int]:
        """Rows and columns that a picture becomes."""
        rows, columns = self.size
        if self.resize != "within":
            return rows, columns
        scale = min(1.0, columns / width, rows / height)
        return max(_LEAST, round(scale * height)), max(_LEAST, round(scale * width))

    def box(self, width: int, height: int) -> tuple[float, float, float, float]:
        """The part of a picture that is shown: left, top, right, bottom, in its pixels."""
        rows, columns = self.size
        if self.resize != "crop":
            wide, high = self.crop_fraction * width, self.crop_fraction * height
        else:
            wide = self.crop_fraction * min(width, height * columns / rows)
            high = wide * rows / columns
        left, top = (width - wide) / 2, (height - high) / 2
        return (left, top, left + wide, top + high)


# So that thumbnails are not made of what is smaller still.
_SMALL = Fit((THUMBNAIL_SIDE // 2, THUMBNAIL_SIDE // 2))


@dataclass(frozen=True)
class Loaded:
    """A picture, twice."""

    pixels: Pixels
    """uint8 RGB [rows, columns, 3] of the encoder's input."""
    thumbnail: bytes | None
    """The whole picture for people, a JPEG of at most 240 pixels a side; None where it was not asked for."""
    box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    """What ``pixels`` show of the upright picture: left, top, right, bottom, in parts of its width and height."""


def load_image(
    data: bytes, fit: Fit, limits: ImageLimits | None = None, *, thumbnail: bool = False
) -> Loaded:
    """Load the first frame of an image: upright, over white where transparent, as ``fit`` wants it.

    Args:
        data: JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF or (with the extra heif) HEIC, recognised by content.
        thumbnail: also make one.

    Raises:
        ImageTypeError: not one of these formats.
        ImageTooLargeError: over the byte limit, or by its header over that of pixels or memory, before any is decoded.
        ImageError: empty, truncated or damaged.
    """
    with _opened(data, fit, limits or ImageLimits(), thumbnail) as (image, _):
        try:
            image.load()
            turn = _TURNS.get(_orientation(image))
            width, height = image.size
            lying, upright = fit, (width, height)
            if turn in _SWAPPING:
                lying, upright = fit.turned(), (height, width)
            rows, columns = lying.made(width, height)
            box = lying.box(width, height)
            left, top, right, bottom = fit.box(*upright)
            pixels = _reduce(image, (columns, rows), box, _FILTERS[fit.filter], turn)
            small = _thumbnail(image, turn) if thumbnail else None
        except (ImageError, MemoryError):
            raise
        except Exception as error:
            raise ImageError(f"truncated or damaged {image.format} data") from error
    wide, high = upright
    return Loaded(np.asarray(pixels), small, (left / wide, top / high, right / wide, bottom / high))


def loading_bytes(data: bytes, fit: Fit, limits: ImageLimits) -> int:
    """Memory that loading takes, about, for what shares it among pictures. A header that only a decoder can read, in
    native code that allocates, counts for all that the limits allow.

    Raises:
        ImageError: as ``load_image``, for what its header tells.
    """
    name = _format_name(data)
    if name is not None and name not in _PLAIN_HEADERS:
        return limits.max_load_bytes
    with _opened(data, fit, limits, False) as (_, memory):
        return memory


@contextmanager
def _opened(
    data: bytes, fit: Fit, limits: ImageLimits, thumbnail: bool
) -> Iterator[tuple[Image.Image, int]]:
    """The picture by its header, within the limits, and the memory that loading it takes; its decoder knows how far to
    reduce it."""
    if not data:
        raise ImageError("empty file")
    if len(data) > limits.max_bytes:
        raise ImageTooLargeError(f"{len(data)} bytes, over the limit of {limits.max_bytes}")
    name = _format_name(data)
    if name is None:
        raise ImageTypeError(f"not a {ACCEPTED} image")
    if not has_loader(name):
        raise ImageTypeError(f"HEIC, which takes the extra: pip install 'captioner[{HEIF_EXTRA}]'")
    if name == "PNG":
        data = _without_broken_chunks(data)
    try:
        image = Image.open(io.BytesIO(data), formats=[name])
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        # Pillow's own limit, which comes first only where ours is set above it.
        raise ImageTooLargeError("more pixels than Pillow decodes") from error
    except MemoryError:
        raise
    except Exception as error:  # what damaged files make Pillow raise is no finite list
        raise ImageError(f"damaged {name} header") from error
    with image:
        width, height = image.size
        if width * height > limits.max_pixels:
            raise ImageTooLargeError(
                f"{width}x{height} pixels, over the limit of {limits.max_pixels} in all"
            )
        try:
            _draft(image, fit, thumbnail)
            memory = _memory(name, image, width * height)
        except Exception as error:
            raise ImageError(f"damaged {name} header") from error
        if memory > limits.max_load_bytes:
            raise ImageTooLargeError(
                f"{width}x{height} pixels of {name} take {memory:,} bytes, over the limit of {limits.max_load_bytes:,}"
            )
        yield image, memory


def _draft(image: Image.Image, fit: Fit, thumbnail: bool) -> None:
    """Let libjpeg scale by 1/2, 1/4 or 1/8 while decoding.

    Kept at twice the target or more, that differs from the full decode by 0.3 of 255 on average and takes a third of
    the time at 12 megapixels.
    """
    wanted = []
    for one in (
        fit,
        fit.turned(),
        *[_SMALL] * thumbnail,
    ):  # whether it is turned is known only later
        left, top, right, bottom = one.box(*image.size)
        rows, columns = one.made(*image.size)
        across, down = columns / (right - left), rows / (bottom - top)
        wanted.append((2 * across * image.width, 2 * down * image.height))
    width, height = (math.ceil(max(sides)) for sides in zip(*wanted, strict=True))
    image.draft(None, (width, height))


def _memory(name: str, image: Image.Image, pixels: int) -> int:
    """Bytes that loading takes, about: of ``pixels`` in the file, of which a draft may decode fewer."""
    memory = image.width * image.height * _BYTES_PER_PIXEL[name]
    if image.info.get("progressive"):
        memory += pixels * len(image.getbands()) * _BYTES_PER_COEFFICIENT
    return memory


@cache
def has_loader(name: str) -> bool:
    """Whether pictures of a format, by Pillow's name of it, can be loaded here; one thread loads a picture."""
    if name == "AVIF":
        AvifImagePlugin.DEFAULT_MAX_THREADS = 1
    if name == "HEIF":
        if find_spec("pillow_heif") is None:
            return False
        import pillow_heif

        # The picture itself, not whatever thumbnail somebody put beside it.
        pillow_heif.register_heif_opener(decode_threads=1, thumbnails=False)
    return True


def _without_broken_chunks(data: bytes) -> bytes:
    """A PNG without those of its ancillary chunks (colour profile, text ...) that have a wrong checksum, as browsers
    read it; Pillow refuses it."""
    kept = [data[:8]]
    position, length = 8, len(data)
    while position + 12 <= length:
        (size,) = struct.unpack_from(">I", data, position)
        end = position + 12 + size
        ancillary = bool(data[position + 4] & 0x20)
        if not ancillary or end > length or _checksum_is_right(data, position, end):
            kept.append(data[position:end])
        position = end
    kept.append(data[position:])
    return b"".join(kept) if sum(map(len, kept)) < length else data


def _checksum_is_right(data: bytes, start: int, end: int) -> bool:
    (written,) = struct.unpack_from(">I", data, end - 4)
    return bool(zlib.crc32(memoryview(data)[start + 4 : end - 4]) == written)


def _format_name(data: bytes) -> str | None:
    if data[4:8] == b"ftyp":
        # The brand itself, then a number, then all that the file is compatible with.
        size = min(int.from_bytes(data[:4]), 64)
        brands = [data[8:12], *(data[at : at + 4] for at in range(16, size, 4))]
        return next((_BRANDS[brand] for brand in brands if brand in _BRANDS), None)
    for signature, name in _SIGNATURES.items():
        if data.startswith(signature):
            return name if name != "WEBP" or data[8:12] == b"WEBP" else None
    return None


def _reduce(
    image: Image.Image,
    size: tuple[int, int],
    box: tuple[float, float, float, float] | None,
    filter: Image.Resampling,
    turn: Image.Transpose | None,
) -> Image.Image:
    """Reduced before it is turned and laid over white, so that a large image is copied as rarely as possible."""
    small = _eight_bit(image).resize(size, filter, box, reducing_gap=3.0)
    if turn is not None:
        small = small.transpose(turn)
    if small.mode in ("LA", "RGBA"):
        white = Image.new("RGBA", small.size, "white")
        small = Image.alpha_composite(white, small.convert("RGBA"))
    return small.convert("RGB")


def _thumbnail(image: Image.Image, turn: Image.Transpose | None) -> bytes:
    scale = min(1.0, THUMBNAIL_SIDE / max(image.size))
    size = (max(1, round(scale * image.width)), max(1, round(scale * image.height)))
    file = io.BytesIO()
    small = _reduce(image, size, None, Image.Resampling.BILINEAR, turn)
    small.info.clear()  # or Pillow would copy what somebody wrote into the original
    small.save(file, "JPEG", quality=_THUMBNAIL_QUALITY)
    return file.getvalue()


def _orientation(image: Image.Image) -> object:
    # Pillow's exif_transpose also writes the remaining tags back, and fails on some that cameras write.
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # the picture may be whole, whatever is wrong with what is said about it
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
