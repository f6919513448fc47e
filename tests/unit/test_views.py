"""Views of a picture for augmentation: each where its name says, the same in every run."""

import numpy as np
import pytest

from captioner.images.load import Fit, Pixels, load_image
from captioner.images.views import crop, other_views, view_names
from tests.pictures import picture

IDS = ["a.jpg", "b.jpg", "c.jpg"]


@pytest.fixture(scope="module")
def images() -> Pixels:
    return np.stack(
        [load_image(picture(number), Fit((224, 160))).pixels for number in range(len(IDS))]
    )


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("crops", [0, 3])
def test_views_are_those_that_are_named(images: Pixels, mirrored: bool, crops: int) -> None:
    found = dict(other_views(images, IDS, mirrored=mirrored, crops=crops))
    assert tuple(found) == view_names(mirrored, crops)
    for pixels in found.values():
        assert (pixels.shape, pixels.dtype) == (images.shape, np.uint8)
        assert pixels.flags.c_contiguous
    if mirrored:
        np.testing.assert_array_equal(found["_mirrored"][:, :, 0], images[:, :, -1])


def test_every_other_crop_is_mirrored_where_mirror_images_are(images: Pixels) -> None:
    plain = dict(other_views(images, IDS, mirrored=False, crops=2))
    mixed = dict(other_views(images, IDS, mirrored=True, crops=2))
    np.testing.assert_array_equal(mixed["_crop1"], plain["_crop1"][:, :, ::-1])
    np.testing.assert_array_equal(mixed["_crop2"], plain["_crop2"])


def test_a_crop_depends_on_its_image_and_number_alone(images: Pixels) -> None:
    views = dict(other_views(images, IDS, mirrored=False, crops=2))
    alone = dict(other_views(images[1:2], IDS[1:2], mirrored=False, crops=2))
    for name, pixels in alone.items():
        np.testing.assert_array_equal(pixels[0], views[name][1])
    assert not np.array_equal(views["_crop1"], views["_crop2"])
    same = images[0]
    assert not np.array_equal(crop(same, "a.jpg", 1), crop(same, "b.jpg", 1))


def test_a_crop_is_a_large_part_of_the_picture() -> None:
    """The picture says where each pixel lies, so the crop says what it shows."""
    ramp = np.arange(224, dtype=np.uint8)
    place = np.stack(np.broadcast_arrays(ramp, ramp[:, None], np.uint8(0)), axis=-1)
    areas = []
    for number in range(200):
        shown = crop(place, "a.jpg", number).astype(float)
        width, height = np.ptp(shown[:, :, 0]) + 1, np.ptp(shown[:, :, 1]) + 1
        # In order: nothing is mirrored or turned.
        assert (np.diff(shown[0, :, 0]) >= 0).all()
        assert (np.diff(shown[:, 0, 1]) >= 0).all()
        assert 0.75 < width / height < 1.34
        areas.append(width * height / 224**2)
    assert 0.4 < min(areas) < 0.5
    assert 0.9 < max(areas) <= 1.01
