"""Data sets of the hub, by name: from its cache alone, never over a network."""

import hashlib
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from captioner.config import SourceConfig
from captioner.errors import SourceError
from captioner.sources import hub, open_source
from tests.sources import IMAGE, captions_of, picture, read_all


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, and no network: the hub's client reads the variables at import only."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def hub_table(name: str, split: str, rows: int) -> pa.Table:
    """Rows in the schema of the hub's copy."""
    images = pa.array(
        [{"bytes": picture(f"{split}/{n}"), "path": None} for n in range(rows)], IMAGE
    )
    texts = [[f"{split} {n} {k}" for k in range(5)] for n in range(rows)]
    if name == "flickr8k":
        columns = {f"caption_{k}": pa.array([five[k] for five in texts]) for k in range(5)}
    else:
        columns = {
            "caption": pa.array(texts),
            "sentids": pa.array([[str(5 * n + k) for k in range(5)] for n in range(rows)]),
            # The files' names decide: the copy's card vouches for these, not for the column.
            "split": pa.array(["test"] * rows),
            "img_id": pa.array([str(n) for n in range(rows)]),
            "filename": pa.array([f"{n}.jpg" for n in range(rows)]),
        }
    return pa.table({"image": images} | columns)


def fill_cache(cache: Path, name: str, rows: dict[str, int]) -> None:
    """What a download leaves: blobs, a snapshot of links to them, a reference."""
    root = cache / f"datasets--{hub.REPOSITORIES[name].name.replace('/', '--')}"
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = root / "snapshots" / commit / "data"
    snapshot.mkdir(parents=True)
    (root / "blobs").mkdir()
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(commit)
    for split, count in rows.items():
        file = f"{split}-00000-of-00001-7025a2b596f14b7b.parquet"
        pq.write_table(hub_table(name, split, count), root / file)
        blob = root / "blobs" / hashlib.sha256((root / file).read_bytes()).hexdigest()
        (root / file).rename(blob)
        (snapshot / file).symlink_to(blob)


@pytest.mark.parametrize("name", sorted(hub.REPOSITORIES))
def test_hub_names_are_read_from_the_cache(
    hub_cache: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    images = {"train": 3, "validation": 2, "test": 2}
    repository = hub.Repository(hub.REPOSITORIES[name].name, images)
    monkeypatch.setitem(hub.REPOSITORIES, name, repository)
    written = {"train": 3, "validation" if name == "flickr8k" else "val": 2, "test": 2}
    fill_cache(hub_cache, name, written)
    source = open_source(name, SourceConfig(limit=2))
    rows = read_all(source)
    assert Counter(row["split"] for row in rows) == {"train": 2, "validation": 2, "test": 2}
    captions = captions_of(source)
    assert list(captions) == [row["image_id"] for row in rows]
    assert all(
        row["bytes"] == picture(captions[row["image_id"]][0].rpartition(" ")[0].replace(" ", "/"))
        for row in rows
    )
    assert {len(texts) for texts in captions.values()} == {5}
    assert source.identity().uri == name
    monkeypatch.setitem(images, "test", 7)
    with pytest.raises(
        SourceError, match="holds 2 test, 3 train, 2 validation images, expected 7 test"
    ):
        open_source(name)


@pytest.mark.parametrize("name", sorted(hub.REPOSITORIES))
@pytest.mark.usefixtures("hub_cache")
def test_hub_without_cache_and_network_says_what_to_do(name: str) -> None:
    with pytest.raises(SourceError) as raised:
        open_source(name)
    message = str(raised.value)
    assert hub.REPOSITORIES[name].name in message
    assert f"hf download --repo-type dataset {hub.REPOSITORIES[name].name}" in message
    assert "\n" not in message
