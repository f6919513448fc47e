"""The likest pictures of a store: exactly those, in order."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from captioner.artifacts.feature_store import FeatureStore
from captioner.config import SearchConfig
from captioner.errors import ImageError, StoreError
from captioner.features import likeness
from tests.pictures import picture
from tests.stores import write_store


def test_the_likest_are_those_of_the_largest_cosine(tmp_path: Path) -> None:
    store = FeatureStore.open(write_store(tmp_path / "store", {"train": 50, "test": 9}, files=3))
    table = store.to_pandas(["image_id", "pooled", "error"])
    good = table[table["error"].isna()]
    vectors = np.stack(good["pooled"].to_list())
    query = torch.nn.functional.normalize(torch.tensor(vectors[7]), dim=0)
    cosines = vectors @ query.numpy() / np.linalg.norm(vectors, axis=1)
    order = np.lexsort((good["image_id"], -cosines))
    found = likeness._nearest(store, query, 12)
    assert found["image_id"].to_pylist() == good["image_id"].iloc[order[:12]].to_list()
    np.testing.assert_allclose(found["cosine"].to_numpy(), cosines[order[:12]], atol=1e-6)
    assert len(likeness._nearest(store, query, 1000)) == len(good)


def test_the_sheet_is_no_larger_than_people_look_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = write_store(tmp_path / "store", {"train": 20})
    (tmp_path / "a.png").write_bytes(picture(1, "PNG"))
    monkeypatch.setattr(likeness, "_SHOWN", 10)
    monkeypatch.setattr(likeness, "_embed", lambda store, pixels: torch.ones(6))
    config = SearchConfig(
        features=uri, image=f"{tmp_path}/a.png", output=f"{tmp_path}/found", k=10**6
    )
    assert len(likeness.find_alike(config).rows) == 20
    with Image.open(tmp_path / "found/grid.png") as sheet:
        assert sheet.height < sheet.width  # two rows of five


def test_what_is_no_picture_leaves_no_directory(tmp_path: Path) -> None:
    uri = write_store(tmp_path / "store", {"train": 3})
    (tmp_path / "a.jpg").write_bytes(picture(1)[:50])
    config = SearchConfig(features=uri, image=f"{tmp_path}/a.jpg", output=f"{tmp_path}/found")
    with pytest.raises(ImageError, match=r"a\.jpg: "):
        likeness.find_alike(config)
    for image in (tmp_path, tmp_path / "none.jpg"):
        with pytest.raises(StoreError):
            likeness.find_alike(config.model_copy(update={"image": str(image)}))
    assert not (tmp_path / "found").exists()
