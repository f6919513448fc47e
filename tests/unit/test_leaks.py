"""Pictures of a split that are in train, too, are found and counted."""

import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from captioner.artifacts.feature_store import FeatureStore
from captioner.features.leaks import find_leaks, tell_leaks
from tests.stores import write_store

BYTES = {"test-0002": "train-0004", "test-0003": "train-0004"}
VECTORS = {"test-0001": "train-0007"}


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    """Two pictures of test have the bytes of one of train, another has the vector of one in another length."""
    uri = write_store(tmp_path / "store", {"train": 9, "test": 4}, files=2)
    for file in sorted((tmp_path / "store/features").iterdir()):
        table = pq.read_table(file)
        ids = table["image_id"].to_pylist()
        same = BYTES | {name: name for name in BYTES.values()}
        digests = pa.array([same.get(name, f"of {name}") for name in ids])
        index = table.schema.get_field_index("sha256")
        pq.write_table(table.set_column(index, "sha256", digests), file)
    vectors = {
        row["image_id"]: np.array(row["pooled"])
        for row in FeatureStore.open(uri).to_arrow(["image_id", "pooled"]).to_pylist()
        if row["pooled"] is not None
    }
    for file in sorted((tmp_path / "store/features").iterdir()):
        table = pq.read_table(file)
        rows = [
            None
            if name not in vectors
            else vectors[VECTORS.get(name, name)] * (1 + 2 * (name in VECTORS))
            for name in table["image_id"].to_pylist()
        ]
        flat = pa.array(rows, table.schema.field("pooled").type.storage_type)
        tensor = pa.ExtensionArray.from_storage(table.schema.field("pooled").type, flat)
        index = table.schema.get_field_index("pooled")
        pq.write_table(table.set_column(index, table.schema.field("pooled"), tensor), file)
    return FeatureStore.open(uri)


def trained(store: FeatureStore) -> FeatureStore:
    encoder = store.manifest.encoder.model_copy(update={"weights": "imagenet"})
    return FeatureStore(store.uri, store.manifest.model_copy(update={"encoder": encoder}))


def test_equal_bytes_and_equal_vectors_are_found(store: FeatureStore) -> None:
    assert find_leaks(trained(store), "test").pairs == sorted((BYTES | VECTORS).items())
    assert find_leaks(trained(store), "train").pairs == []
    assert find_leaks(trained(store), "validation").pairs == []


def test_vectors_of_a_random_network_say_nothing(store: FeatureStore) -> None:
    found = find_leaks(store, "test")
    assert (found.pairs, found.by_vectors) == ([*BYTES.items()], False)


def test_they_are_told_with_a_count_and_examples(
    store: FeatureStore, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        tell_leaks(trained(store), "train", "test")
    assert caplog.messages == [
        "3 pictures of split test in train, too (equal bytes, or a cosine over 0.999): "
        "test-0001 = train-0007, test-0002 = train-0004, test-0003 = train-0004"
    ]
