"""Data sets that ``datasets`` reads: of the hub, which is a server on loopback, and of folders."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants

from captioner.config import SourceConfig
from captioner.errors import OutOfReachError, SourceError
from captioner.sources import hf, open_source
from tests.cases import encoded
from tests.hub import Hub, serve_hub
from tests.sources import IMAGE, captions_of, picture, read_all, write_images

ROOT = Path(__file__).resolve().parents[2]
# In a process of its own: the hub's client takes the hub's address from the environment when it is imported.
READ = """
import json, sys
from captioner.config import SourceConfig
from captioner.errors import CaptionerError
from captioner.sources import open_source
from tests.sources import captions_of, read_all
for spec in sys.argv[2:]:
    try:
        source = open_source(spec, SourceConfig.model_validate_json(sys.argv[1]))
        rows = [[row["image_id"], row["split"], row["bytes"].decode()] for row in read_all(source)]
        print(json.dumps([rows, list(captions_of(source).values()), source.identity().uri]))
    except CaptionerError as error:
        print(json.dumps([type(error).__name__, str(error)]))
"""


def read(hub: Hub, home: Path, *specs: str, **options: Any) -> list[Any]:
    environment = os.environ | hub.environment | {"HF_HOME": str(home)}
    done = subprocess.run(
        [sys.executable, "-c", READ, json.dumps(options), *specs],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def table(split: str, rows: int, **columns: Any) -> bytes:
    images = [{"bytes": picture(f"{split} {number}"), "path": None} for number in range(rows)]
    texts = [f"{split} {number}" for number in range(rows)]
    file = io.BytesIO()
    pq.write_table(pa.table({"image": pa.array(images, IMAGE), "text": texts} | columns), file)
    return file.getvalue()


def test_a_data_set_of_the_hub_is_fetched_once(tmp_path: Path) -> None:
    files = {
        "data/train-00000-of-00001.parquet": table("train", 3),
        "data/validation-00000-of-00001.parquet": table("validation", 2),
        "data/unlabeled-00000-of-00001.parquet": table("unlabeled", 1),
    }
    with serve_hub() as hub:
        hub.commits["org/name"] = {}
        commit = hub.commit("org/name", files)
        ((rows, captions, uri),) = read(hub, tmp_path, "hf:org/name")
        assert uri == f"hf:org/name@{commit}"
        assert [(row[1], row[2]) for row in rows] == [
            ("train", "bytes of train 0"), ("train", "bytes of train 1"), ("train", "bytes of train 2"),
            # Of a split that is none of three, where others are.
            ("train", "bytes of unlabeled 0"),
            ("validation", "bytes of validation 0"), ("validation", "bytes of validation 1"),
        ]  # fmt: skip
        assert [[row[2].removeprefix("bytes of ")] for row in rows] == captions
        # What is there is neither fetched nor asked for again.
        hub.commit("org/name", {"data/train-00000-of-00001.parquet": table("train", 1)})
        hub.failing = True
        before = len(hub.requests)
        again, (kind, told) = read(hub, tmp_path, "hf:org/name", "hf:org/other")
        assert again == [rows, captions, uri]
        assert not [asked for asked in hub.requests[before:] if "org/name" in asked]
        assert kind == "OutOfReachError"
        assert "the hub cannot be reached" in told
        hub.failing = False
        wrong = ("hf:org/absent", "hf:org/name@v9", "hf:nothing", "hf:a b/c")
        part, *others = read(hub, tmp_path, f"hf:org/name@{commit}", *wrong, limit=1)
        assert part[2] == f"hf:org/name@{commit}"
        assert len(part[0]) == 2
        for spec, (kind, told) in zip(wrong, others, strict=True):
            assert kind == "SourceError"
            assert told.startswith(f"{spec}: ")
            assert "\n" not in told


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_folders_that_datasets_reads(tmp_path: Path, home: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    write_images(tmp_path / "folder", "train/a.jpg", "test/b.jpg")
    for name, split in (("a", "train"), ("b", "test")):
        (tmp_path / f"folder/{split}/{name}.jpg").write_bytes(encoded("JPEG"))
        line = json.dumps({"file_name": f"{name}.jpg", "text": f"caption of {name}"})
        (tmp_path / f"folder/{split}/metadata.jsonl").write_text(line)
    cache = str(tmp_path / "cache")
    loaded = datasets.load_dataset(str(tmp_path / "folder"), cache_dir=cache)
    loaded.save_to_disk(tmp_path / "saved")
    loaded["train"].save_to_disk(tmp_path / "one")
    # As Trainer's caches are: Arrow files and nothing else.
    (tmp_path / "arrow").mkdir()
    for split in ("train", "test"):
        (file,) = (tmp_path / "saved" / split).glob("*.arrow")
        (tmp_path / "arrow" / f"{split}.arrow").write_bytes(file.read_bytes())
    for spec, splits in (
        (f"hf:{tmp_path}/folder", ["test", "train"]),
        (f"{tmp_path}/saved", ["test", "train"]),
        (f"hf:{tmp_path}/saved", ["test", "train"]),
        (f"{tmp_path}/arrow", ["test", "train"]),
        (f"{tmp_path}/one", ["train"]),
    ):
        source = open_source(spec)
        rows = read_all(source)
        assert [row["split"] for row in rows] == splits
        assert all(row["bytes"] == encoded("JPEG") for row in rows)
        expected = {"test": ["caption of b"], "train": ["caption of a"]}
        assert list(captions_of(source).values()) == [expected[split] for split in splits]
    # A folder that has changed is another.
    (tmp_path / "folder/train/metadata.jsonl").write_text('{"file_name": "a.jpg", "text": "New"}')
    texts = captions_of(open_source(f"hf:{tmp_path}/folder"))
    assert ["New"] in texts.values()


def test_what_datasets_cannot_read_is_one_line(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="empty: datasets cannot read it") as raised:
        open_source(f"hf:{tmp_path}/empty")
    assert "\n" not in str(raised.value)
    with pytest.raises(OutOfReachError, match="hf:org/name: not in .* cannot be reached"):
        open_source("hf:org/name")
    assert not list(home.rglob("*.parquet"))
    with pytest.raises(SourceError, match="expected hf:org/name"):
        open_source("hf:org/name/more", SourceConfig())


def test_who_is_killed_while_writing_is_gone_on_after(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(hf, "_FILE_BYTES", 1)
    monkeypatch.setattr(hf, "_ROWS_PER_GROUP", 4)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "set").mkdir()
    for split, rows in (("test", 3), ("train", 10)):
        (tmp_path / f"set/{split}-00000-of-00001.parquet").write_bytes(table(split, rows))
    embed, seen = datasets.table.embed_table_storage, []

    def killed(rows: pa.Table) -> pa.Table:
        seen.append(len(rows))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return embed(rows)

    monkeypatch.setattr(datasets.table, "embed_table_storage", killed)
    with pytest.raises(KeyboardInterrupt):
        open_source(f"hf:{tmp_path}/set")
    source = open_source(f"hf:{tmp_path}/set")
    expected = [picture(f"test {number}") for number in range(3)]
    expected += [picture(f"train {number}") for number in range(10)]
    assert [row["bytes"] for row in read_all(source)] == expected
    assert seen == [4, 4, 2, 2, 3]  # nothing but what was being written came twice
    assert not list(home.rglob("*.partial"))
