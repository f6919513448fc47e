"""Sources through Ray Data, row checkpointing included."""

from operator import itemgetter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray
from ray.data import DataContext
from ray.data.checkpoint import CheckpointConfig

from captioner.artifacts.tables import SOURCE_ROWS
from captioner.config import ShapesConfig, SourceConfig
from captioner.sources import open_source
from captioner.sources.base import Source
from tests.sources import picture, read_all, write_images, write_parquet, write_shard

pytestmark = pytest.mark.usefixtures("local_ray")


def checkpointed(source: Source, checkpoint: Path, output: Path) -> None:
    context = DataContext.get_current()
    context.checkpoint_config = CheckpointConfig(
        id_column="image_id", checkpoint_path=str(checkpoint), delete_checkpoint_on_success=False
    )
    try:
        ray.data.read_datasource(source.images()).write_parquet(str(output))
    finally:
        context.checkpoint_config = None


def make_source(kind: str, folder: Path, limit: int | None) -> Source:
    options = SourceConfig(limit=limit)
    if kind == "shapes":
        shapes = ShapesConfig(train=40, validation=10, test=10)
        return open_source("shapes", options.model_copy(update={"shapes": shapes}))
    if kind == "parquet":
        write_parquet(folder / "train-00000-of-00001.parquet", 40, row_group_size=15)
        write_parquet(folder / "test-00000-of-00001.parquet", 20)
    elif kind == "shards":
        for name, keys in (("train", range(40)), ("test", range(20))):
            write_shard(folder / f"{name}.tar", {f"{key}.jpg": picture(str(key)) for key in keys})
    else:
        write_images(folder, *(f"{number:02d}.jpg" for number in range(60)))
    return open_source(str(folder), options)


@pytest.mark.parametrize("kind", ["parquet", "shards", "folder", "shapes"])
def test_checkpointed_read_skips_done_images(tmp_path: Path, kind: str) -> None:
    part = make_source(kind, tmp_path / "in", limit=5)
    whole = make_source(kind, tmp_path / "in", limit=None)
    checkpointed(part, tmp_path / "checkpoint", tmp_path / "first")
    checkpointed(whole, tmp_path / "checkpoint", tmp_path / "second")
    done = set(pq.read_table(tmp_path / "first")["image_id"].to_pylist())
    rest = pq.read_table(tmp_path / "second")["image_id"].to_pylist()
    assert 0 < len(done) == part.num_images() < whole.num_images() == 60
    assert len(rest) == len(set(rest)) == whole.num_images() - len(done)
    assert not done & set(rest)


@pytest.mark.parametrize("kind", ["shapes", "parquet", "shards", "folder"])
def test_ray_reads_the_rows_the_tasks_make(tmp_path: Path, kind: str) -> None:
    source = make_source(kind, tmp_path, limit=None)
    rows = ray.data.read_datasource(source.images()).take_all()
    expected = [{name: row[name] for name in SOURCE_ROWS.names} for row in read_all(source)]
    assert sorted(rows, key=itemgetter("image_id")) == sorted(expected, key=itemgetter("image_id"))
    assert ray.data.read_datasource(source.images()).limit(7).count() == 7


def test_small_folder_is_read_by_every_cpu(tmp_path: Path) -> None:
    write_images(tmp_path, *(f"{number:03d}.jpg" for number in range(100)))
    tasks = open_source(str(tmp_path)).images().get_read_tasks(1)
    assert len(tasks) >= 2 * ray.cluster_resources()["CPU"]
