"""What is read of a source in a run that continues: all that is not done, and nothing else."""

import random
from pathlib import Path

import pytest

from captioner.config import ShapesConfig, SourceConfig
from captioner.sources import open_source
from captioner.sources.base import Source
from tests.sources import ids_left, picture, read_all, rows_left, write_images, write_parquet

SHAPES = SourceConfig(shapes=ShapesConfig(train=130, validation=5, test=5))


@pytest.fixture(params=["folder", "parquet", "limited parquet", "shapes"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Source:
    if request.param == "shapes":
        return open_source("shapes", SHAPES)
    if request.param == "folder":
        write_images(tmp_path, *(f"{number % 3}/{number:03d}.jpg" for number in range(150)))
        return open_source(str(tmp_path))
    for number, name in enumerate(("train", "val")):
        write_parquet(tmp_path / f"{name}.parquet", 1500 + number, row_group_size=700)
    options = SourceConfig(limit=1200 if request.param == "limited parquet" else None)
    return open_source(str(tmp_path), options)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_what_is_done_is_neither_announced_nor_read(source: Source, share: float) -> None:
    ids = [row["image_id"] for row in read_all(source)]
    done = random.Random(7).sample(ids, int(share * len(ids)))
    left = ids_left(source, done)
    assert sorted(left) == sorted(set(ids) - set(done))


def test_where_all_is_done_nothing_is_left(source: Source) -> None:
    assert ids_left(source, [row["image_id"] for row in read_all(source)]) == []


def test_rows_between_those_that_are_done_are_their_own(tmp_path: Path) -> None:
    write_parquet(tmp_path / "x.parquet", 900, captions=None, row_group_size=900)
    done = [f"x/{number:06d}" for number in range(900) if number % 7]
    rows = rows_left(open_source(str(tmp_path)), done)
    assert [row["image_id"] for row in rows] == [f"x/{number:06d}" for number in range(0, 900, 7)]  # fmt: skip
    for number, row in zip(range(0, 900, 7), rows, strict=True):
        assert row["bytes"] == picture(f"x.parquet/{number}")
        assert row["uri"].endswith(f"x.parquet#{number}")
