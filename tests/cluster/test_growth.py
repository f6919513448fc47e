"""A store that grows: what is new is encoded, nothing else, and the whole is what a fresh extraction gives."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from captioner.artifacts.collection import Tables
from captioner.artifacts.feature_store import FeatureStore
from captioner.artifacts.manifests import CaptionsManifest, StoreManifest, open_manifest
from captioner.artifacts.tables import CAPTIONED_ROWS
from captioner.artifacts.verify import verify
from captioner.captioning.collection import caption_collection
from captioner.config import (
    CaptionConfig,
    CompactConfig,
    EncoderConfig,
    ExtractConfig,
    SourceConfig,
)
from captioner.errors import SourceError, StoreError
from captioner.features import compact as compaction
from captioner.features.compact import compact
from captioner.features.extract import extract
from captioner.features.growth import Growth
from tests.models import write_model
from tests.pictures import picture

pytestmark = [pytest.mark.usefixtures("local_ray"), pytest.mark.timeout(900)]

ENCODER = EncoderConfig(weights="random", layer="layer3")


def config(source: Path, output: Path, **changes: Any) -> ExtractConfig:
    options = {"source": str(source), "output": str(output), "max_reject_fraction": 0.5}
    return ExtractConfig.model_validate(options | changes)


def write_captions(folder: Path, **corrected: str) -> None:
    lines = [
        {"file_name": file.name, "text": corrected.get(file.stem, f"picture {file.stem}")}
        for file in sorted(folder.glob("*.jpg"))
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metadata.jsonl").write_text(text)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number in range(12):
        (folder / f"{number:02d}.jpg").write_bytes(picture(number))
    (folder / "bad.jpg").write_bytes(b"no picture")
    write_captions(folder)
    return folder


@pytest.fixture(scope="module")
def first(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("stores") / "first"
    extract(config(photos, output, encoder=ENCODER))
    return output


@pytest.fixture(scope="module")
def changed(photos: Path, first: Path) -> Path:
    """Two are new, one has other content, one another time, one is gone, and a caption is corrected."""
    for number in (20, 21):
        (photos / f"{number}.jpg").write_bytes(picture(number))
    (photos / "03.jpg").write_bytes(picture(33))
    os.utime(photos / "04.jpg", (1, 1))
    (photos / "05.jpg").unlink()
    write_captions(photos, **{"00": "a corrected caption"})
    return photos


def content(store: FeatureStore) -> dict[str, Any]:
    """All that readers see, by id."""
    rows = {
        row.image_id: (row.sha256, row.error, None if row.error else row.pooled.tobytes())
        for row in store.to_pandas(["image_id", "sha256", "error", "pooled"]).itertuples()
    }
    captions = {split: store.captions(split) for split in store.manifest.splits}
    return {"rows": rows, "captions": captions}


def encoded(store: StoreManifest) -> int:
    """Rows of the newest part."""
    return sum(e.rows or 0 for e in store.tables("features") if not e.path.startswith("/"))


@pytest.fixture(scope="module")
def grown(changed: Path, first: Path) -> Path:
    """Stopped where its rows are all there, and run again."""
    output = first.parent / "grown"
    asked = config(changed, output, extends=str(first))
    with pytest.raises(SourceError, match="1 of 13 images .* are gone: --accept-gone"):
        extract(asked)
    asked = asked.model_copy(update={"accept_gone": True})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Growth, "finish", _stop)
        with pytest.raises(KeyboardInterrupt):
            extract(asked)
    extract(asked)
    return output


def _stop(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_the_whole_is_what_a_fresh_extraction_gives(
    changed: Path, first: Path, grown: Path, tmp_path: Path
) -> None:
    before = content(FeatureStore.open(str(first)))
    store = FeatureStore.open(str(grown))
    extract(config(changed, tmp_path / "fresh", encoder=ENCODER))
    fresh = FeatureStore.open(str(tmp_path / "fresh"))
    assert content(store) == content(fresh)
    assert content(store) != before
    assert store.manifest.counts == fresh.manifest.counts
    assert store.manifest.splits == fresh.manifest.splits
    assert store.manifest.encoder == fresh.manifest.encoder
    # Two new ones, the changed one, and the one of another time, which was looked at and is what it was.
    assert encoded(store.manifest) == 4
    assert verify(str(grown)).problems == []
    assert store.read_encoder_weights() == fresh.read_encoder_weights()
    assert not (grown / "encoder.safetensors").exists()
    for split in store.manifest.splits:
        np.testing.assert_array_equal(
            store.load(split, ("pooled",)).columns["pooled"],
            fresh.load(split, ("pooled",)).columns["pooled"],
        )


def test_corrected_captions_encode_nothing(changed: Path, grown: Path, tmp_path: Path) -> None:
    write_captions(changed, **{"01": "corrected, too"})
    output = tmp_path / "corrected"
    manifest = extract(config(changed, output, extends=str(grown)))
    assert encoded(manifest) == 0
    texts = [text for split in manifest.splits for text in sum_captions(output, split)]
    assert "corrected, too" in texts
    assert "a corrected caption" not in texts
    assert verify(str(output)).problems == []


def sum_captions(store: Path, split: str) -> list[str]:
    found = FeatureStore.open(str(store)).captions(split)
    return [text for texts in found.values() for text in texts]


def test_another_source_only_adds_and_its_ids_must_differ(grown: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for name, number in (("00.jpg", 40), ("new.jpg", 41)):
        (other / name).write_bytes(picture(number))
    asked = config(other, tmp_path / "both", extends=str(grown))
    with pytest.raises(SourceError, match=r"00.jpg is an image of another source .*id-prefix"):
        extract(asked)
    options = SourceConfig(id_prefix="other/")
    manifest = extract(asked.model_copy(update={"source_options": options}))
    assert encoded(manifest) == 2
    names = set(
        FeatureStore.open(str(tmp_path / "both")).to_arrow(["image_id"])["image_id"].to_pylist()
    )
    assert {"other/00.jpg", "other/new.jpg", "00.jpg"} <= names
    assert len(names) == len(FeatureStore.open(str(grown)).to_arrow(["image_id"])) + 2
    assert len(manifest.parts) == 2
    # The first source again, in the store with both.
    again = extract(
        config(
            Path(FeatureStore.open(str(grown)).manifest.source.uri),
            tmp_path / "third",
            extends=str(tmp_path / "both"),
        )
    )
    assert encoded(again) == 0
    assert again.counts.ok == manifest.counts.ok


def test_other_settings_than_the_stores_are_refused(
    changed: Path, grown: Path, tmp_path: Path
) -> None:
    asked = config(changed, tmp_path / "x", extends=str(grown), grid=True)
    with pytest.raises(StoreError, match="was made with grid False"):
        extract(asked)
    other = ENCODER.model_copy(update={"layer": "layer4"})
    with pytest.raises(StoreError, match="has another encoder: .*layer: 'layer3' there"):
        extract(asked.model_copy(update={"grid": False, "encoder": other}))


def test_content_is_looked_at_where_that_is_asked_for(
    changed: Path, grown: Path, tmp_path: Path
) -> None:
    file = changed / "07.jpg"
    state = file.stat()
    data = bytearray(picture(7))
    data[-3] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert encoded(extract(config(changed, tmp_path / "a", extends=str(grown)))) == 0
    options = SourceConfig(digest=True)
    manifest = extract(config(changed, tmp_path / "b", extends=str(grown), source_options=options))
    digest = content(FeatureStore.open(str(tmp_path / "b")))["rows"]["07.jpg"][0]
    assert digest != content(FeatureStore.open(str(grown)))["rows"]["07.jpg"][0]
    assert encoded(manifest) == len(list(changed.glob("*.jpg")))


def test_a_compacted_store_needs_no_older_parts(first: Path, grown: Path, tmp_path: Path) -> None:
    output = tmp_path / "whole"
    asked = CompactConfig(features=str(grown), output=str(output))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compaction, "_BYTES", 1)  # a file each
        patch.setattr(StoreManifest, "model_copy", _stop)
        with pytest.raises(KeyboardInterrupt):
            compact(asked)
        patch.undo()
        patch.setattr(compaction, "_BYTES", 1)
        compact(asked)
    expected = content(FeatureStore.open(str(grown)))
    hidden = [path.rename(path.with_name(f"{path.name}-away")) for path in (first, grown)]
    try:
        store = FeatureStore.open(str(output))
        assert content(store) == expected
        assert verify(str(output)).problems == []
        assert (output / "encoder.safetensors").is_file()
        frame = pd.read_parquet(output / "features")
        assert sorted(frame["image_id"]) == sorted(expected["rows"])
    finally:
        for path in hidden:
            path.rename(path.with_name(path.name.removesuffix("-away")))
    assert (
        encoded(
            extract(config(Path(store.manifest.source.uri), tmp_path / "on", extends=str(output)))
        )
        <= 1
    )


def captions_of(output: Path) -> dict[str, tuple[str | None, str | None]]:
    tables = Tables(str(output), open_manifest(str(output), CaptionsManifest), "captions")
    rows = (
        row for table in tables.rows(tables.entries(), CAPTIONED_ROWS) for row in table.to_pylist()
    )
    found = [(row["image_id"], (row["caption"], row["error"])) for row in rows]
    assert len(found) == len(dict(found))
    return dict(found)


def test_captions_grow_likewise(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(5):
        (photos / f"{number}.jpg").write_bytes(picture(number))

    def caption(name: str, **changes: Any) -> CaptionsManifest:
        options = {"images": str(photos), "model": model, "output": f"{tmp_path}/{name}"}
        return caption_collection(CaptionConfig.model_validate(options | changes))

    caption("first", format="txt", contact_sheet=True)
    (photos / "5.jpg").write_bytes(picture(5))
    (photos / "0.jpg").write_bytes(picture(50))
    (photos / "1.jpg").unlink()
    grown = caption(
        "grown", extends=f"{tmp_path}/first", format="txt", contact_sheet=True, accept_gone=True
    )
    caption("fresh")
    assert captions_of(tmp_path / "grown") == captions_of(tmp_path / "fresh")
    new = [entry for entry in grown.tables("captions") if not entry.path.startswith("/")]
    assert sum(entry.rows or 0 for entry in new) == 2
    assert len(list((tmp_path / "grown/txt").iterdir())) == 5
    assert (tmp_path / "grown/contact_sheet.html").read_text().count("<figure>") == 5
    assert verify(str(tmp_path / "grown")).problems == []
    manifest = caption("table", extends=f"{tmp_path}/grown", format="csv")
    frame = pd.read_csv(tmp_path / "table/captions.csv")
    assert dict(zip(frame["image_id"], frame["caption"], strict=True)) == {
        name: text for name, (text, _) in captions_of(tmp_path / "fresh").items()
    }
    assert "captions.csv" in [entry.path for entry in manifest.files]
    (photos / "6.jpg").write_bytes(picture(6))
    caption("more", extends=f"{tmp_path}/table", format="jsonl")
    caption("fresher")
    assert captions_of(tmp_path / "more") == captions_of(tmp_path / "fresher")
    assert len((tmp_path / "more/captions.jsonl").read_text().splitlines()) == 6
    assert verify(str(tmp_path / "more")).problems == []
    with pytest.raises(StoreError, match="was captioned otherwise: sentences"):
        caption("other", extends=f"{tmp_path}/grown", sentences=True)
    with pytest.raises(StoreError, match="was captioned otherwise: decode.beam_size"):
        caption("other", extends=f"{tmp_path}/grown", decode={"beam_size": 2})
