"""A feature store is read by its manifest alone: what it lists, less what it removes, checked page by page."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from captioner.artifacts.feature_store import FeatureStore
from captioner.artifacts.manifests import FileEntry
from captioner.errors import StoreError
from tests.stores import write_store


def edit_manifest(root: Path, change: dict[str, object]) -> None:
    manifest = json.loads((root / "manifest.json").read_text())
    (root / "manifest.json").write_text(json.dumps(manifest | change))


def test_files_that_the_manifest_does_not_list_are_not_read(tmp_path: Path) -> None:
    store = FeatureStore.open(write_store(tmp_path, {"train": 5}, files=2))
    before = store.load("train", ("pooled",))
    rows = pq.read_table(tmp_path / "features/0.parquet")
    pq.write_table(rows, tmp_path / "features/left-by-a-kill.parquet")
    after = FeatureStore.open(str(tmp_path)).load("train", ("pooled",))
    assert after.image_ids == before.image_ids
    np.testing.assert_array_equal(after.columns["pooled"], before.columns["pooled"])


def test_rows_that_were_removed_do_not_count(tmp_path: Path) -> None:
    """A row that is there twice counts once, and one that is gone not at all."""
    write_store(tmp_path, {"train": 5}, files=2)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    files = [entry for entry in manifest["files"] if entry["path"].startswith("features/")]
    rows = {entry["path"]: pq.read_table(tmp_path / entry["path"]) for entry in files}
    first = files[0]["path"]
    again = {**files[0], "path": "features/again.parquet"}
    pq.write_table(rows[first], tmp_path / again["path"])
    repeated = rows[first]["image_id"].to_pylist()
    gone = rows[files[1]["path"]]["image_id"][0].as_py()
    removed = pa.table(
        {
            "file": [again["path"]] * len(repeated) + [files[1]["path"]],
            "image_id": [*repeated, gone],
        }
    )
    pq.write_table(removed, tmp_path / "removed.parquet")
    entry = FileEntry(path="removed.parquet", bytes=1, rows=len(removed)).model_dump()
    splits = {"train": {"images": 4, "captions": 12}}
    change = {"files": [*manifest["files"], again], "removed": entry, "splits": splits}
    edit_manifest(tmp_path, change)
    store = FeatureStore.open(str(tmp_path))
    ids = store.image_ids("train")
    assert gone not in ids
    assert len(ids) == len(set(ids)) == 4
    assert set(store.captions("train")) == set(ids)
    assert sum(len(chunk.rows) for chunk in store.chunks("train", 100)) == 4


def test_files_of_an_older_part_lie_elsewhere(tmp_path: Path) -> None:
    # Under a directory of that name its captions are no features.
    write_store(tmp_path / "features", {"train": 5}, files=2)
    expected = FeatureStore.open(str(tmp_path / "features")).load("train", ("pooled",))
    manifest = json.loads((tmp_path / "features" / "manifest.json").read_text())
    for entry in manifest["files"]:
        entry["path"] = str(tmp_path / "features" / entry["path"])
    (tmp_path / "newer").mkdir()
    (tmp_path / "newer" / "manifest.json").write_text(json.dumps(manifest))
    store = FeatureStore.open(str(tmp_path / "newer"))
    found = store.load("train", ("pooled",))
    assert found.image_ids == expected.image_ids
    np.testing.assert_array_equal(found.columns["pooled"], expected.columns["pooled"])
    assert set(store.thumbnails(found.image_ids)) == set(found.image_ids)


def test_rows_that_are_missing_or_repeated_are_damage(tmp_path: Path) -> None:
    write_store(tmp_path, {"train": 5}, files=2)
    edit_manifest(tmp_path, {"splits": {"train": {"images": 6, "captions": 15}}})
    with pytest.raises(StoreError, match="5 rows of 5 images in split 'train', 6 in the manifest"):
        FeatureStore.open(str(tmp_path)).load("train", ("pooled",))


def test_a_flipped_bit_in_a_page_is_noticed(tmp_path: Path) -> None:
    write_store(tmp_path, {"train": 5})
    path = tmp_path / "features/0.parquet"
    table = pq.read_table(path)
    pq.write_table(table, path, write_page_checksum=True, compression="none", use_dictionary=False)
    vector = table["pooled"].chunk(0).storage[0].as_py()
    data = bytearray(path.read_bytes())
    place = data.index(np.array(vector, np.float32).tobytes())
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError, match=r"damaged.*(CRC|checksum|corrupt)"):
        FeatureStore.open(str(tmp_path)).load("train", ("pooled",))


@pytest.mark.parametrize("damaged", ["features/0.parquet", "captions/0.parquet"])
@pytest.mark.parametrize("how", ["cut", "gone"])
def test_damage_is_one_line_wherever_it_is_met(tmp_path: Path, damaged: str, how: str) -> None:
    write_store(tmp_path, {"train": 5})
    path = tmp_path / damaged
    if how == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        path.unlink()
    readers = [
        lambda store: store.load("train", ("pooled",)),
        lambda store: store.captions("train"),
        lambda store: list(store.caption_batches("train")),
        lambda store: store.image_ids("train"),
    ]
    if damaged.startswith("features"):
        readers.append(lambda store: store.thumbnails(["train-0000"]))
    for read in readers:
        with pytest.raises(StoreError) as caught:
            read(FeatureStore.open(str(tmp_path)))
        assert "\n" not in str(caught.value)


def test_thumbnails_of_removed_rows_are_not_shown(tmp_path: Path) -> None:
    write_store(tmp_path, {"train": 2})
    pq.write_table(
        pa.table({"file": ["features/0.parquet"], "image_id": ["train-0000"]}),
        tmp_path / "removed.parquet",
    )
    removed = FileEntry(path="removed.parquet", bytes=1, rows=1).model_dump()
    edit_manifest(tmp_path, {"removed": removed})
    store = FeatureStore.open(str(tmp_path))
    assert list(store.thumbnails(["train-0000", "train-0001"])) == ["train-0001"]


def test_corrected_captions_and_splits_take_the_place_of_the_first(tmp_path: Path) -> None:
    write_store(tmp_path, {"train": 3})
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    before = FeatureStore.open(str(tmp_path))
    old = [entry["path"] for entry in manifest["files"] if entry["path"].startswith("captions/")]
    rows = pa.table(
        {
            "image_id": ["train-0000", "train-0001"],
            "split": ["train", "test"],
            "caption": ["Corrected.", "Moved."],
            "index": pa.array([0, 0], pa.int32()),
        }
    )
    pq.write_table(rows, tmp_path / "captions/corrected.parquet")
    corrected = FileEntry(path="captions/corrected.parquet", bytes=1, rows=2, sha256="c" * 64)
    gone = [(file, name) for file in old for name in ("train-0000", "train-0001")]
    removed = {"file": [file for file, _ in gone], "image_id": [name for _, name in gone]}
    pq.write_table(pa.table(removed), tmp_path / "removed.parquet")
    edit_manifest(
        tmp_path,
        {
            "files": [*manifest["files"], corrected.model_dump()],
            "removed": FileEntry(path="removed.parquet", bytes=1, rows=len(gone)).model_dump(),
            "splits": {
                "train": {"images": 2, "captions": 4},
                "test": {"images": 1, "captions": 1},
            },
        },
    )
    store = FeatureStore.open(str(tmp_path))
    assert store.captions("train")["train-0000"] == ["Corrected."]
    assert store.image_ids("train") == ["train-0000", "train-0002"]
    assert store.captions("test") == {"train-0001": ["Moved."]}
    # Nothing was encoded again, and yet what was trained on the old captions is another run's.
    assert store.identity() != before.identity()


@pytest.mark.parametrize("folder", ["features", "captions"])
def test_an_older_part_may_lie_in_a_folder_of_any_name(tmp_path: Path, folder: str) -> None:
    older = tmp_path / folder / "store"
    write_store(older, {"train": 3})
    manifest = json.loads((older / "manifest.json").read_text())
    for entry in manifest["files"]:
        entry["path"] = str(older / entry["path"])
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert len(FeatureStore.open(str(tmp_path)).image_ids("train")) == 3


def test_another_encoders_weights_are_not_handed_on(tmp_path: Path) -> None:
    store = FeatureStore.open(write_store(tmp_path, {"train": 1}))
    data = bytearray(store.read_encoder_weights())
    data[-1] ^= 1
    (tmp_path / "encoder.safetensors").write_bytes(data)
    with pytest.raises(StoreError, match="not the file that was published"):
        store.read_encoder_weights()
