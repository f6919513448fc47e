"""Load damaged images: ``python -m tests.fuzz_images --count 10000 --seed 0 --kind avif``.

Each mutant must either load as a 224x224 RGB array or raise ImageError, within a second and without the process
growing. The exit status is 1 when one does anything else; ``--keep DIR`` writes such files there.
"""

import argparse
import io
import random
import resource
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pillow_heif
from PIL import Image

from captioner.config import ImageLimits
from captioner.errors import ImageError
from captioner.images.load import Fit, load_image

FIT = Fit((224, 224))
LIMITS = ImageLimits(max_pixels=4_000_000)
# What one process may address: a mutant whose header asks for more must be refused, not swapped in.
ADDRESS_SPACE = 4 * 2**30
SLOW_SECONDS = 1.0


def seed_images() -> dict[str, bytes]:
    """Small pictures in every format and mode that is accepted, by name."""
    pillow_heif.register_heif_opener()
    gradient = np.linspace(0, 255, 48 * 64 * 4).reshape(48, 64, 4).astype(np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 4), np.uint8)
    rgba = Image.fromarray((gradient // 2 + noise // 2).astype(np.uint8))
    rgb, grey = rgba.convert("RGB"), rgba.convert("L")
    palette, cmyk, bits = rgb.quantize(16), rgb.convert("CMYK"), grey.convert("1")
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a description"
    pages = [rgb.rotate(180), rgb.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    variants: dict[str, tuple[Image.Image, str, dict[str, object]]] = {
        "jpeg": (rgb, "JPEG", {}),
        "jpeg-progressive": (rgb, "JPEG", {"progressive": True}),
        "jpeg-grey": (grey, "JPEG", {}),
        "jpeg-cmyk": (cmyk, "JPEG", {}),
        "jpeg-exif": (rgb, "JPEG", {"exif": exif, "icc_profile": bytes(300)}),
        "jpeg-large": (rgb.resize((1024, 960)), "JPEG", {}),
        "mpo": (rgb, "MPO", {}),
        "png": (rgb, "PNG", {"exif": exif}),
        "png-alpha": (rgba, "PNG", {}),
        "png-grey-alpha": (rgba.convert("LA"), "PNG", {}),
        "png-palette": (palette, "PNG", {"transparency": 3}),
        "png-16": (deep, "PNG", {}),
        "png-1": (bits, "PNG", {}),
        "apng": (rgb, "PNG", {}),
        "webp": (rgb, "WEBP", {"exif": exif}),
        "webp-lossless": (rgba, "WEBP", {"lossless": True}),
        "webp-animated": (rgb, "WEBP", {}),
        "gif": (palette, "GIF", {"transparency": 2}),
        "gif-animated": (rgb, "GIF", {}),
        "bmp": (rgb, "BMP", {}),
        "bmp-palette": (palette, "BMP", {}),
        "bmp-1": (bits, "BMP", {}),
        "tiff": (rgb, "TIFF", {"exif": exif}),
        "tiff-lzw": (rgba, "TIFF", {"compression": "tiff_lzw"}),
        "tiff-deflate": (grey, "TIFF", {"compression": "tiff_deflate"}),
        "tiff-jpeg": (rgb, "TIFF", {"compression": "jpeg"}),
        "tiff-cmyk": (cmyk, "TIFF", {}),
        "tiff-fax": (bits, "TIFF", {"compression": "group4"}),
        "tiff-16": (deep, "TIFF", {}),
        "tiff-pages": (rgb, "TIFF", {}),
        "avif": (rgb, "AVIF", {"exif": exif}),
        "avif-alpha": (rgba, "AVIF", {}),
        "avif-grey": (grey, "AVIF", {"subsampling": "4:0:0"}),
        "avif-animated": (rgb, "AVIF", {}),
        "heic": (rgb, "HEIF", {"exif": exif}),
        "heic-alpha": (rgba, "HEIF", {}),
        "heic-grey": (grey, "HEIF", {}),
        "heic-pages": (rgb, "HEIF", {}),
    }
    several = (
        "mpo",
        "apng",
        "webp-animated",
        "gif-animated",
        "tiff-pages",
        "avif-animated",
        "heic-pages",
    )
    encoded = {}
    for name, (image, kind, options) in variants.items():
        file = io.BytesIO()
        # Copies, because saving leaves the settings of one format on an image for the next.
        more = [page.copy() for page in pages] if name in several else []
        image.copy().save(file, kind, save_all=bool(more), append_images=more, **options)
        encoded[name] = file.getvalue()
    return encoded


def mutate(data: bytes, other: bytes, generator: random.Random) -> bytes:
    """One to four of: flipped bits, an overwritten, cut, doubled or spliced piece, an edited header."""
    result = bytearray(data)
    for _ in range(generator.randint(1, 4)):
        if not result:
            break
        generator.choice(_MUTATIONS)(result, other, generator)
    return bytes(result)


def _flip(data: bytearray, other: bytes, generator: random.Random) -> None:
    for _ in range(generator.choice((1, 1, 2, 8, 64))):
        data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)


def _truncate(data: bytearray, other: bytes, generator: random.Random) -> None:
    del data[generator.randrange(len(data)) :]


def _cut(data: bytearray, other: bytes, generator: random.Random) -> None:
    start = generator.randrange(len(data))
    del data[start : start + generator.randint(1, 64)]


def _double(data: bytearray, other: bytes, generator: random.Random) -> None:
    start = generator.randrange(len(data))
    data[start:start] = data[start : start + generator.randint(1, 256)]


def _splice(data: bytearray, other: bytes, generator: random.Random) -> None:
    start = generator.randrange(len(other))
    piece = other[start : start + generator.randint(1, 512)]
    position = generator.randrange(len(data))
    data[position : position + generator.choice((0, len(piece)))] = piece


def _edit_header(data: bytearray, other: bytes, generator: random.Random) -> None:
    # Extreme numbers where sizes, offsets and counts are.
    size = generator.choice((1, 2, 4))
    value = generator.choice((0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF))
    position = generator.randrange(min(len(data), 128))
    number = (value % 256**size).to_bytes(size, generator.choice(("little", "big")))
    data[position : position + size] = number


Mutation = Callable[[bytearray, bytes, random.Random], None]
_MUTATIONS: tuple[Mutation, ...] = (
    _flip,
    _truncate,
    _cut,
    _double,
    _splice,
    _edit_header,
    _edit_header,
)


def fuzz(
    count: int, seed: int, keep: Path | None = None, kind: str = ""
) -> tuple[Counter[str], float, int]:
    """Outcomes by kind, the slowest load in seconds, and the growth of the process in KiB; of images whose names begin
    with ``kind``."""
    generator = random.Random(seed)
    seeds = {name: data for name, data in seed_images().items() if name.startswith(kind)}
    for data in seeds.values():
        load_image(data, FIT)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes: Counter[str] = Counter()
    slowest = 0.0
    for _ in range(count):
        name, other = generator.choice(list(seeds)), generator.choice(list(seeds))
        data = mutate(seeds[name], seeds[other], generator)
        start = time.perf_counter()
        try:
            pixels = load_image(data, FIT, LIMITS).pixels
            fine = pixels.shape == (224, 224, 3) and pixels.dtype == np.uint8
            outcome = "loaded" if fine else "FAILED: wrong array"
        except ImageError as error:
            # Sizes differ from mutant to mutant.
            outcome = "refused: " + "".join("N" if part.isdigit() else part for part in str(error))
        except BaseException as error:  # a fuzzer reports everything that gets out
            outcome = f"FAILED: {type(error).__name__}: {error}"
            if keep is not None:
                (keep / f"{seed}-{outcomes.total()}-{name}").write_bytes(data)
        seconds = time.perf_counter() - start
        if seconds > SLOW_SECONDS:
            outcomes[f"FAILED: slow: {name}"] += 1
        slowest = max(slowest, seconds)
        outcomes[outcome] += 1
    return outcomes, slowest, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000, help="mutants")
    parser.add_argument("--seed", type=int, default=0, help="of the mutations")
    parser.add_argument("--keep", type=Path, help="existing directory for mutants that fail")
    parser.add_argument("--kind", default="", help="only images whose names begin so: avif, heic")
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    outcomes, slowest, growth = fuzz(options.count, options.seed, options.keep, options.kind)
    seconds = time.perf_counter() - start
    for outcome, number in outcomes.most_common():
        print(f"{number:7,}  {outcome}")
    print(f"{options.count:,} mutants in {seconds:.1f} s, slowest {slowest * 1e3:.0f} ms")
    print(f"memory grew {growth / 1024:.0f} MiB")
    return int(any(outcome.startswith("FAILED") for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
