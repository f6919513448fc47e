"""The likest pictures of a store: exactly those, in order."""

from pathlib import Path

import numpy as np
import torch

from captioner.artifacts.feature_store import FeatureStore
from captioner.features import likeness
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
