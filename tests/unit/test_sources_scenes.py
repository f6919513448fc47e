"""Generated scenes: the captions are true of the picture, and both repeat exactly."""

import hashlib
import io
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from captioner.config import ShapesConfig, SourceConfig
from captioner.sources import open_source
from captioner.sources.scenes import COLOURS, SHAPES, SIDE, draw_scene, make_scene, parse
from tests.sources import captions_of, read_all

INDICES = range(100)


def pixels(index: int) -> np.ndarray:
    image = Image.open(io.BytesIO(draw_scene(0, "train", index)))
    assert (image.format, image.mode, image.size) == ("PNG", "RGB", (SIDE, SIDE))
    return np.asarray(image).astype(int)


def mask(image: np.ndarray, colour: str) -> np.ndarray:
    return np.abs(image - COLOURS[colour]).max(axis=2) < 12


def blobs(image: np.ndarray) -> int:
    """Connected regions (4 neighbours) of more than a few pixels."""
    left = {(int(y), int(x)) for y, x in np.argwhere(image)}
    count = 0
    while left:
        stack = [left.pop()]
        size = 0
        while stack:
            y, x = stack.pop()
            size += 1
            for near in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                if near in left:
                    left.remove(near)
                    stack.append(near)
        count += size > 8
    return count


def test_five_differing_captions_name_each_group_in_full() -> None:
    shapes = set()
    for index in range(500):
        scene = make_scene(0, "train", index)
        captions = scene.captions()
        assert len(set(captions)) == 5
        for group in (scene.first, scene.second):
            if group is None:
                continue
            shapes.add((group.shape, group.colour, group.size, group.count))
            number = {1: "a", 2: "two", 3: "three"}[group.count]
            plural = "s" if group.count > 1 else ""
            phrase = f"{number} {group.size} {group.colour} {group.shape}{plural}"
            assert all(re.search(rf"\b{phrase}\b", text, re.I) for text in captions)
    # 4 shapes x 6 colours x 2 sizes x 3 counts
    assert len(shapes) > 130


def test_pictures_show_the_colours_and_counts_the_captions_say() -> None:
    for index in INDICES:
        scene = make_scene(0, "train", index)
        image = pixels(index)
        said: dict[str, int] = {}
        for group in (scene.first, scene.second):
            if group is not None:
                said[group.colour] = said.get(group.colour, 0) + group.count
        for colour in COLOURS:
            # Two groups of one colour never touch: their centres lie half a picture apart.
            assert blobs(mask(image, colour)) == said.get(colour, 0), (index, colour)


def test_pictures_show_the_relation_the_captions_say() -> None:
    seen = set()
    for index in INDICES:
        scene = make_scene(0, "train", index)
        if scene.second is None or scene.first.colour == scene.second.colour:
            continue
        image = pixels(index)
        y, x = np.argwhere(mask(image, scene.first.colour)).mean(axis=0)
        other_y, other_x = np.argwhere(mask(image, scene.second.colour)).mean(axis=0)
        true = {
            "left of": x < other_x - 20,
            "right of": x > other_x + 20,
            "above": y < other_y - 20,
            "below": y > other_y + 20,
        }
        assert [name for name, holds in true.items() if holds] == [scene.relation]
        seen.add(scene.relation)
    assert len(seen) == 4


def test_large_objects_cover_more_than_small_ones_of_their_shape() -> None:
    areas: dict[tuple[str, str], list[float]] = {}
    for index in INDICES:
        scene = make_scene(0, "train", index)
        if scene.second is None:
            area = mask(pixels(index), scene.first.colour).sum() / scene.first.count
            areas.setdefault((scene.first.shape, scene.first.size), []).append(float(area))
    for shape in SHAPES:
        assert max(areas[shape, "small"]) < min(areas[shape, "large"])


def test_a_scene_depends_on_seed_split_and_index_alone() -> None:
    assert draw_scene(0, "train", 3) == draw_scene(0, "train", 3)
    others = [draw_scene(1, "train", 3), draw_scene(0, "test", 3), draw_scene(0, "train", 4)]
    assert len({draw_scene(0, "train", 3), *others}) == 4


def test_another_process_draws_the_same_bytes() -> None:
    program = (
        "import hashlib; from captioner.sources.scenes import draw_scene, make_scene\n"
        "for index in range(5):\n"
        "    data = draw_scene(0, 'test', index) + str(make_scene(0, 'test', index)).encode()\n"
        "    print(hashlib.sha256(data).hexdigest())"
    )
    scenes = (
        draw_scene(0, "test", index) + str(make_scene(0, "test", index)).encode()
        for index in range(5)
    )
    printed = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONHASHSEED": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert printed.split() == [hashlib.sha256(data).hexdigest() for data in scenes]


def test_shapes_have_their_splits_and_five_captions_each() -> None:
    source = open_source(
        "shapes", SourceConfig(shapes=ShapesConfig(train=130, validation=3, test=2))
    )
    rows = read_all(source)
    assert Counter(row["split"] for row in rows) == {"train": 130, "validation": 3, "test": 2}
    captions = captions_of(source)
    assert list(captions) == [row["image_id"] for row in rows]
    assert all(len(texts) == 5 for texts in captions.values())
    assert rows[7]["uri"] == "shapes://train/7?seed=0"
    assert rows[7]["size"] == len(rows[7]["bytes"])
    other_seed = ShapesConfig(train=130, validation=3, test=2, seed=1)
    assert open_source("shapes", SourceConfig(shapes=other_seed)).identity() != source.identity()


def test_what_a_caption_says_is_read_back_from_it() -> None:
    for index in range(300):
        scene = make_scene(0, "test", index)
        assert {parse(text) for text in scene.captions()} == {scene.facts}
        assert {parse(text.lower().rstrip(".")) for text in scene.captions()} == {scene.facts}


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a red circle in the picture",
        "a small red circles in the picture",
        "two small red circle in the picture",
        "there are a small red circle in the picture",
        "a small red circle to the left of",
        "a small red circle left of a large blue star",
        "a small red circle above a large blue star below a small red star",
        "a small red circle and a large blue star in the picture",
        "a small red circle above a small red circle above a small red circle",
        "the picture shows a small red circle in the picture",
    ],
)
def test_what_is_no_caption_of_a_scene_says_nothing(caption: str) -> None:
    assert parse(caption) is None
