"""Every kind of picture comes out as upright RGB, and everything else is refused with a reason."""

import io
import struct
import zlib
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from captioner.config import ImageLimits
from captioner.errors import ImageError, ImageTooLargeError, ImageTypeError
from captioner.images.load import (
    THUMBNAIL_SIDE,
    Fit,
    Loaded,
    Pixels,
    has_loader,
    load_image,
    sniff_format,
)
from tests.fuzz_images import LIMITS, fuzz, mutate, seed_images

# Pillow warns about what it can still read in damaged files.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")

ORIGINALS = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "originals"
SEEDS = seed_images()


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.copy().save(file, kind, **options)
    return file.getvalue()


def solid(mode: str, color: object, size: tuple[int, int] = (40, 30)) -> Image.Image:
    return Image.new(mode, size, color)  # type: ignore[arg-type]


def halves(left: tuple[int, int, int], right: tuple[int, int, int]) -> Image.Image:
    image = Image.new("RGB", (64, 48), left)
    image.paste(right, (32, 0, 64, 48))
    return image


FIT = Fit((224, 224))


def load(data: bytes, limits: ImageLimits | None = None) -> Pixels:
    return load_image(data, FIT, limits).pixels


RED, BLUE, GREY = (255, 0, 0), (0, 0, 255), (128, 128, 128)


@pytest.mark.parametrize("name", sorted(SEEDS))
def test_every_format_and_mode_decodes_to_one_shape(name: str) -> None:
    pixels = load(SEEDS[name])
    assert pixels.shape == (224, 224, 3)
    assert pixels.dtype == np.uint8
    assert pixels.std() > 10


@pytest.mark.parametrize(
    ("image", "kind", "options", "expected"),
    [
        (solid("RGB", RED), "PNG", {}, RED),
        (solid("RGB", RED), "JPEG", {"quality": 100, "subsampling": 0}, RED),
        (solid("RGB", RED), "JPEG", {"progressive": True}, RED),
        (solid("RGB", RED), "WEBP", {"lossless": True}, RED),
        (solid("RGB", RED), "GIF", {}, RED),
        (solid("RGB", RED), "BMP", {}, RED),
        (solid("RGB", RED), "TIFF", {}, RED),
        (solid("RGB", RED), "TIFF", {"big_tiff": True}, RED),
        (solid("RGB", RED), "AVIF", {"quality": 100}, RED),
        (solid("RGBA", (255, 0, 0, 0)), "AVIF", {}, (255, 255, 255)),
        (solid("RGB", RED), "HEIF", {"quality": 100, "chroma": 444}, RED),
        (solid("RGBA", (255, 0, 0, 0)), "HEIF", {}, (255, 255, 255)),
        (solid("L", 128), "PNG", {}, GREY),
        (solid("LA", (128, 255)), "PNG", {}, GREY),
        (solid("LA", (0, 0)), "PNG", {}, (255, 255, 255)),
        (solid("RGBA", (255, 0, 0, 255)), "PNG", {}, RED),
        (solid("RGBA", (255, 0, 0, 0)), "PNG", {}, (255, 255, 255)),
        (solid("RGBA", (255, 0, 0, 128)), "PNG", {}, (255, 127, 127)),
        (solid("RGB", RED), "PNG", {"transparency": RED}, (255, 255, 255)),
        (solid("L", 7), "PNG", {"transparency": 7}, (255, 255, 255)),
        (solid("RGB", RED).quantize(4), "PNG", {}, RED),
        (solid("RGB", RED).quantize(4), "PNG", {"transparency": 0}, (255, 255, 255)),
        (solid("RGB", RED).quantize(4), "GIF", {"transparency": 0}, (255, 255, 255)),
        (solid("CMYK", (0, 255, 255, 0)), "TIFF", {}, RED),
        # Pillow writes and reads CMYK JPEGs the way Adobe does, inverted and marked so.
        (solid("CMYK", (0, 255, 255, 0)), "JPEG", {"quality": 100}, (255, 0, 0)),
        (solid("1", 1), "PNG", {}, (255, 255, 255)),
        (solid("1", 0), "PNG", {}, (0, 0, 0)),
        (solid("I;16", 128 * 257), "PNG", {}, GREY),
        (solid("I;16", 128 * 257), "TIFF", {}, GREY),
        (solid("I;16", 65535), "PNG", {}, (255, 255, 255)),
    ],
)
def test_colors_survive(
    image: Image.Image, kind: str, options: dict[str, object], expected: tuple[int, int, int]
) -> None:
    pixels = load(encode(image, kind, **options)).astype(int)
    assert np.abs(pixels - expected).max() <= 2


def test_adobe_inverted_cmyk_is_not_a_negative() -> None:
    data = encode(solid("CMYK", (0, 0, 0, 0)), "JPEG")
    assert b"Adobe" in data
    assert load(data).min() >= 250


def test_sixteen_bit_greys_are_scaled_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 224 * 224).reshape(224, 224).astype(np.uint16)
    pixels = load(encode(Image.fromarray(ramp)))
    np.testing.assert_array_equal(pixels[:, :, 0], ramp // 256)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "HEIF"])
def test_orientation_tag_is_applied(kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned: the viewer must turn it a quarter clockwise
    # HEIC says it in a property of its own, which pillow-heif writes for tags in bytes alone.
    tags = exif.tobytes() if kind == "HEIF" else exif
    pixels = load(encode(halves(RED, BLUE), kind, exif=tags)).astype(int)
    assert np.abs(pixels[:100] - RED).mean() < 10
    assert np.abs(pixels[124:] - BLUE).mean() < 10


def test_orientation_of_a_transparent_sixteen_bit_or_palette_picture_is_applied_too() -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    left_white = np.zeros((48, 64), np.uint16)
    left_white[:, :32] = 65535
    variants = [Image.fromarray(left_white), halves((255, 255, 255), (0, 0, 0)).convert("RGBA")]
    variants.append(halves((255, 255, 255), (0, 0, 0)).quantize(4))
    for image in variants:
        pixels = load(encode(image, exif=exif))
        assert pixels[:, :100].max() < 5, image.mode
        assert pixels[:, 124:].min() > 250, image.mode


def test_all_eight_orientations_come_out_upright() -> None:
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 256, (224, 224, 3), np.uint8))
    # How each orientation stores the picture: the inverse of what the viewer must do.
    stored = {
        1: upright,
        2: upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: upright.transpose(Image.Transpose.ROTATE_180),
        4: upright.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: upright.transpose(Image.Transpose.TRANSPOSE),
        6: upright.transpose(Image.Transpose.ROTATE_90),
        7: upright.transpose(Image.Transpose.TRANSVERSE),
        8: upright.transpose(Image.Transpose.ROTATE_270),
    }
    for orientation, image in stored.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = encode(image, exif=exif)
        np.testing.assert_array_equal(load(data), np.asarray(upright), str(orientation))


@pytest.mark.parametrize(
    "exif",
    [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0II*\0\x08\0\0\0\xff\xff"],
)
def test_damaged_exif_does_not_cost_the_picture(exif: bytes) -> None:
    for kind in ("JPEG", "PNG", "WEBP"):
        plain, damaged = encode(halves(RED, BLUE), kind), encode(halves(RED, BLUE), kind, exif=exif)
        assert len(damaged) > len(plain)
        np.testing.assert_array_equal(load(damaged), load(plain), kind)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_of_several_is_taken(kind: str) -> None:
    data = encode(
        solid("RGB", RED),
        kind,
        save_all=True,
        append_images=[solid("RGB", BLUE), solid("RGB", GREY)],
    )
    assert np.abs(load(data).astype(int) - RED).max() <= 5


@pytest.mark.parametrize("size", [(1, 1), (1, 20_000), (20_000, 1), (224, 224), (223, 225)])
def test_any_shape_is_squashed(size: tuple[int, int]) -> None:
    pixels = load(encode(solid("RGB", RED, size)))
    np.testing.assert_array_equal(pixels, np.broadcast_to(RED, (224, 224, 3)))


def test_picture_of_the_target_size_is_left_as_it_is() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (224, 224, 3), np.uint8)
    np.testing.assert_array_equal(load(encode(Image.fromarray(pixels))), pixels)


def test_squashing_averages_what_it_leaves_out() -> None:
    checks = np.indices((896, 896)).sum(axis=0) % 2 * 255
    pixels = load(encode(Image.fromarray(checks.astype(np.uint8))))
    assert np.abs(pixels[8:-8, 8:-8].astype(int) - 127).max() <= 2


def test_large_jpeg_decoded_at_reduced_size_stays_close_to_the_full_decode() -> None:
    generator = np.random.default_rng(0)
    tiles = Image.fromarray(generator.integers(0, 256, (48, 64, 3), np.uint8))
    tiles = tiles.resize((2400, 1800), Image.Resampling.NEAREST)
    grain = Image.fromarray(generator.integers(0, 256, (1800, 2400, 3), np.uint8))
    data = encode(Image.blend(tiles, grain, 0.3), "JPEG", quality=90)
    full = Image.open(io.BytesIO(data)).resize((224, 224), Image.Resampling.BILINEAR)
    difference = np.abs(load(data).astype(int) - np.asarray(full).astype(int))
    # Decoded at the next smaller size the mean is 2.3.
    assert 0 < difference.mean() < 1
    assert difference.max() < 12


def test_same_bytes_give_the_same_pixels() -> None:
    for data in SEEDS.values():
        np.testing.assert_array_equal(load(data), load(data))


@pytest.mark.parametrize(
    "data",
    [
        b"plain text",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%PDF-1.7",
        b"RIFF\0\0\0\0WAVE",
        b"\0",
    ],
)
def test_other_types_are_refused(data: bytes) -> None:
    assert sniff_format(data) is None
    with pytest.raises(
        ImageTypeError, match="not a JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF or HEIC image"
    ):
        load(data)


@pytest.mark.parametrize("kind", ["PPM", "ICO", "PCX", "TGA", "SGI", "JPEG2000"])
def test_formats_off_the_list_are_refused_though_pillow_reads_them(kind: str) -> None:
    with pytest.raises(ImageTypeError):
        load(encode(solid("RGB", RED), kind))


def test_empty_file_is_refused() -> None:
    with pytest.raises(ImageError, match="^empty file$"):
        load(b"")


def test_byte_limit_is_inclusive() -> None:
    data = encode(solid("RGB", RED))
    load(data, ImageLimits(max_bytes=len(data)))
    with pytest.raises(
        ImageTooLargeError, match=f"^{len(data)} bytes, over the limit of {len(data) - 1}$"
    ):
        load(data, ImageLimits(max_bytes=len(data) - 1))


def test_pixel_limit_is_inclusive() -> None:
    data = encode(solid("RGB", RED, (40, 30)))
    load(data, ImageLimits(max_pixels=1200))
    with pytest.raises(ImageTooLargeError, match="^40x30 pixels, over the limit of 1199 in all$"):
        load(data, ImageLimits(max_pixels=1199))


def png_header(width: int, height: int) -> bytes:
    """A PNG that ends in the middle of its pixels, whatever size it claims."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100)))


@pytest.mark.parametrize("size", [(8001, 8001), (50_000, 50_000), (2**31 - 1, 2**31 - 1)])
def test_pixel_limit_is_checked_before_anything_is_decoded(size: tuple[int, int]) -> None:
    # Decoding would report the missing pixels instead.
    with pytest.raises(ImageTooLargeError, match="pixels"):
        load(png_header(*size))


def test_pixel_limit_above_pillows_own_leaves_pillows_in_force() -> None:
    with pytest.raises(ImageTooLargeError, match="more pixels than Pillow decodes"):
        load(png_header(50_000, 50_000), ImageLimits(max_pixels=10**10))


@pytest.mark.parametrize("name", sorted(SEEDS))
def test_truncated_image_is_refused(name: str) -> None:
    data = SEEDS[name]
    # Several pictures in one file: the first is whole when the cut falls behind it.
    several = (
        "mpo",
        "apng",
        "webp-animated",
        "gif-animated",
        "tiff-pages",
        "avif-animated",
        "heic-pages",
    )
    pages = 3 if name in several else 1
    for length in (16, 40, len(data) // (2 * pages)):
        with pytest.raises(ImageError, match="truncated or damaged|damaged .* header") as refusal:
            load(data[:length])
        assert not isinstance(refusal.value, ImageTypeError | ImageTooLargeError), length


@pytest.mark.parametrize("mode", ["I", "F"])
def test_samples_without_a_defined_white_are_refused(mode: str) -> None:
    with pytest.raises(ImageError, match="32-bit samples"):
        load(encode(solid(mode, 1), "TIFF"))


@pytest.mark.parametrize(
    ("name", "content_type"),
    [
        ("jpeg", "image/jpeg"),
        ("jpeg-progressive", "image/jpeg"),
        ("mpo", "image/jpeg"),
        ("png", "image/png"),
        ("webp", "image/webp"),
        ("gif", "image/gif"),
        ("bmp", "image/bmp"),
        ("tiff", "image/tiff"),
        ("avif", "image/avif"),
        ("heic", "image/heic"),
    ],
)
def test_content_type_goes_by_content(name: str, content_type: str) -> None:
    assert sniff_format(SEEDS[name]) == content_type


def test_big_endian_tiff_is_known() -> None:
    data = encode(Image.fromarray(np.zeros((4, 4), ">u2")), "TIFF", big_tiff=False)
    assert sniff_format(b"MM\0*" + data[4:]) == "image/tiff"


@given(st.binary(max_size=200))
def test_random_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(ImageError):
        load(data)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(sorted(SEEDS)), st.sampled_from(sorted(SEEDS)), st.integers(0, 2**32))
def test_mutated_image_decodes_or_is_refused(name: str, other: str, seed: int) -> None:
    data = mutate(SEEDS[name], SEEDS[other], Random(seed))
    try:
        pixels = load(data, LIMITS)
    except ImageError:
        return
    assert pixels.shape == (224, 224, 3)


class UnheardOfError(Exception):
    pass


@pytest.mark.parametrize("error", [OSError, SyntaxError, OverflowError, UnheardOfError])
def test_whatever_pillow_raises_on_damaged_data_becomes_one_error(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise error("from Pillow")

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", fail)
    with pytest.raises(ImageError, match="^truncated or damaged PNG data$"):
        load(SEEDS["png"])


def test_a_picture_that_memory_does_not_suffice_for_is_not_called_damaged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*args: object) -> None:
        raise MemoryError

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", fail)
    with pytest.raises(MemoryError):
        load(SEEDS["png"])


def test_a_tiff_that_overflows_inside_pillow_is_refused(shared: Path) -> None:
    data = (shared / "cases/tiff_overflow.tif").read_bytes()
    with pytest.raises(ImageError, match="damaged TIFF"):
        load(data)


def test_fuzzer_reports_what_gets_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(data: bytes, fit: Fit, limits: ImageLimits | None = None) -> Loaded:
        if limits is not None:
            raise KeyError("escaped")
        return Loaded(np.zeros((224, 224, 3), np.uint8), None)

    monkeypatch.setattr("tests.fuzz_images.load_image", broken)
    outcomes, _, _ = fuzz(3, seed=0)
    assert outcomes == {"FAILED: KeyError: 'escaped'": 3}


def test_real_photographs_decode() -> None:
    files = sorted(ORIGINALS.glob("*.jpg"))
    if not files:
        pytest.skip("needs the photographs in ../shared/data/originals")
    for file in files:
        data = file.read_bytes()
        exact = (
            Image.open(io.BytesIO(data))
            .convert("RGB")
            .resize((224, 224), Image.Resampling.BILINEAR)
        )
        np.testing.assert_array_equal(load(data), np.asarray(exact))


@pytest.mark.parametrize(("orientation", "size"), [(1, (240, 120)), (6, (120, 240))])
def test_thumbnail_keeps_proportions_and_stands_upright(
    orientation: int, size: tuple[int, int]
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(Image.new("RGB", (800, 400), "red"), "JPEG", exif=exif)
    assert load_image(data, FIT).thumbnail is None
    found = load_image(data, FIT, thumbnail=True).thumbnail
    assert found is not None
    with Image.open(io.BytesIO(found)) as small:
        assert (small.format, small.mode, small.size) == ("JPEG", "RGB", size)
        assert max(size) == THUMBNAIL_SIDE


def test_a_small_picture_is_its_own_thumbnail() -> None:
    found = load_image(encode(solid("RGB", RED, (40, 30))), FIT, thumbnail=True).thumbnail
    assert found is not None
    with Image.open(io.BytesIO(found)) as small:
        assert small.size == (40, 30)


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (300, 300), (1000, 90)])
@pytest.mark.parametrize("fraction", [0.875, 1.0])
def test_a_crop_shows_what_timms_own_transform_shows(
    size: tuple[int, int], fraction: float
) -> None:
    from timm.data.transforms_factory import transforms_imagenet_eval

    noise = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
    image = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)
    theirs = transforms_imagenet_eval(
        224, crop_pct=fraction, interpolation="bicubic", use_prefetcher=True
    )(image)
    fit = Fit((224, 224), "crop", fraction, "bicubic")
    ours = load_image(encode(image), fit).pixels
    # Theirs rounds to whole pixels before it crops.
    difference = np.abs(ours.astype(int) - np.asarray(theirs).transpose(1, 2, 0).astype(int))
    assert difference.mean() < 3


@pytest.mark.parametrize("resize", ["squash", "crop"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_picture_on_its_side_fits_an_input_that_is_not_square(resize: str, kind: str) -> None:
    upright = np.zeros((300, 400, 3), np.uint8)
    upright[:150, :, 0], upright[:, 200:, 2] = 255, 255
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    lying = Image.fromarray(upright).rotate(90, expand=True)
    fit = Fit((64, 128), resize, 0.9)  # type: ignore[arg-type]
    found = load_image(encode(lying, kind, exif=exif), fit)
    expected = load_image(encode(Image.fromarray(upright), kind), fit)
    assert found.pixels.shape == (64, 128, 3)
    assert np.abs(found.pixels.astype(int) - expected.pixels.astype(int)).mean() < 3
    # 0.9 of the largest box twice as wide as high is 360 x 180 pixels of 400 x 300.
    edge = 0.2 if resize == "crop" else 0.05
    assert found.box == pytest.approx((0.05, edge, 0.95, 1 - edge))


@pytest.mark.parametrize("kind", ["JPEG", "GIF"])
def test_thumbnails_keep_no_comment_of_the_original(kind: str) -> None:
    image = solid("RGB", RED, (400, 300)).convert("P" if kind == "GIF" else "RGB")
    data = encode(image, kind, comment=b"secret")
    assert b"secret" in data
    thumbnail = load_image(data, FIT, thumbnail=True).thumbnail
    assert thumbnail is not None
    assert b"secret" not in thumbnail


def test_thumbnails_do_not_shrink_with_the_input() -> None:
    data = encode(solid("RGB", RED, (1000, 1000)), "JPEG")
    thumbnail = load_image(data, Fit((32, 32)), thumbnail=True).thumbnail
    assert thumbnail is not None
    with Image.open(io.BytesIO(thumbnail)) as small:
        assert small.size == (THUMBNAIL_SIDE, THUMBNAIL_SIDE)


def test_a_squashed_picture_may_show_its_middle_alone() -> None:
    assert Fit((10, 10), "squash", 0.5).box(100, 40) == (25.0, 10.0, 75.0, 30.0)
    assert Fit((10, 10), "squash").box(100, 40) == (0.0, 0.0, 100.0, 40.0)


@pytest.mark.parametrize(
    ("brands", "content_type"),
    [
        (b"mif1\0\0\0\0avifmif1", "image/avif"),
        (b"mif1\0\0\0\0mif1heic", "image/heic"),
        (b"msf1\0\0\0\0hevc", "image/heic"),
        (b"isom\0\0\0\0mp42", None),
        (b"mif1\0\0\0\0mif1", None),
    ],
)
def test_brands_tell_avif_and_heic_apart(brands: bytes, content_type: str | None) -> None:
    data = (len(brands) + 8).to_bytes(4) + b"ftyp" + brands
    assert sniff_format(data + b"\0\0\0\x08heic") == content_type


def test_heic_without_its_extra_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("captioner.images.load.find_spec", lambda name: None)
    has_loader.cache_clear()
    try:
        with pytest.raises(
            ImageTypeError, match=r"HEIC, which takes the extra: .*captioner\[heif\]"
        ):
            load(SEEDS["heic"])
        assert load(SEEDS["avif"]).shape == (224, 224, 3)
    finally:
        has_loader.cache_clear()


def test_png_with_a_broken_ancillary_chunk_loads_and_with_a_broken_picture_does_not() -> None:
    data = encode(solid("RGB", RED), "PNG", icc_profile=bytes(200))
    for chunk, fine in ((b"iCCP", True), (b"IDAT", False), (b"IHDR", False)):
        broken = bytearray(data)
        broken[broken.find(chunk) + 5] ^= 1
        if fine:
            assert np.abs(load(bytes(broken)).astype(int) - RED).max() == 0
        else:
            with pytest.raises(ImageError):
                load(bytes(broken))


def test_memory_is_bounded_by_format() -> None:
    """Of the same pixels a WebP takes twice the memory of a PNG, and a JPEG that is drafted next to none."""
    large = Image.new("RGB", (2000, 2000))
    limits = ImageLimits(max_load_bytes=50_000_000)
    for kind, options, fine in (
        ("JPEG", {}, True),
        ("PNG", {}, True),
        ("WEBP", {}, False),
        ("JPEG", {"progressive": True}, True),
        ("AVIF", {"speed": 10}, False),
    ):
        data = encode(large, kind, **options)
        if fine:
            load(data, limits)
        else:
            with pytest.raises(ImageTooLargeError, match=f"2000x2000 pixels of {kind} take 6|5"):
                load(data, limits)
    with pytest.raises(ImageTooLargeError, match="2000x2000 pixels of JPEG take"):
        load(encode(large, "JPEG", progressive=True), ImageLimits(max_load_bytes=20_000_000))
