"""Which captions a worker sees, in which order, and with which features."""

from pathlib import Path

import numpy as np
import pytest
import torch

from captioner.config import TextConfig
from captioner.schema import GRID_CELLS
from captioner.store import FeatureStore
from captioner.text import END, PAD, START, Vocabulary, clean
from captioner.training.data import WINDOW, Batch, CaptionData, epoch_order, sequential_order
from tests.stores import ANIMALS, CHANNELS, write_store


def fake_data(captions: int, images: int = 5) -> CaptionData:
    """Captions of different lengths; the words of caption n are all n + 4, so that it can be recognised."""
    generator = np.random.default_rng(0)
    tokens = [
        [START, *[number + 4] * int(generator.integers(1, 12)), END] for number in range(captions)
    ]
    pooled = np.arange(images * 2, dtype=np.float32).reshape(images, 2)
    return CaptionData(tokens, np.arange(captions) % images, {"pooled": pooled})


def captions_in(batch: Batch) -> list[int]:
    """Numbers of the captions that count in a batch."""
    return [int(row[1]) - 4 for row in batch.tokens if row[1] != PAD]


def load(root: Path, split: str = "train", columns: tuple[str, ...] = ("pooled",)) -> CaptionData:
    store = FeatureStore.open(write_store(root, {"train": 7, "validation": 3}, grid=True))
    captions = [clean(text) for texts in store.captions("train").values() for text in texts]
    return CaptionData.load(
        store, split, columns, Vocabulary.build(captions), TextConfig(max_length=6)
    )


@pytest.mark.parametrize("captions", [1, 7, 64, 65, 8 * WINDOW, 8 * WINDOW + 9])
def test_every_caption_comes_exactly_once_an_epoch(captions: int) -> None:
    lengths = fake_data(captions).lengths
    order = epoch_order(lengths, 8, epoch=3, seed=0)
    assert sorted(np.concatenate(order)) == list(range(captions))
    assert len(order) == -(-captions // 8)
    assert sum(len(batch) < 8 for batch in order) == (captions % 8 > 0)


def test_order_is_decided_by_seed_and_epoch() -> None:
    lengths = fake_data(100).lengths

    def flat(epoch: int, seed: int) -> list[int]:
        return [int(number) for batch in epoch_order(lengths, 8, epoch, seed) for number in batch]

    assert flat(0, 0) == flat(0, 0)
    assert flat(0, 0) != flat(1, 0)
    assert flat(0, 0) != flat(0, 1)


def test_batches_hold_captions_of_similar_length_but_differ_between_epochs() -> None:
    lengths = fake_data(2000).lengths

    def padded(order: list[np.ndarray]) -> float:
        return sum(len(batch) * lengths[batch].max() for batch in order) / lengths.sum()

    order = epoch_order(lengths, 16, 0, 0)
    shuffled = np.random.default_rng(0).permutation(2000)
    assert padded(order) < 1.1 < 1.5 < padded(np.split(shuffled, 125))
    again = {frozenset(batch.tolist()) for batch in epoch_order(lengths, 16, 1, 0)}
    assert not again & {frozenset(batch.tolist()) for batch in order}


@pytest.mark.parametrize("workers", [2, 3, 8])
@pytest.mark.parametrize("captions", [41, 48])
def test_workers_together_see_one_workers_batches(captions: int, workers: int) -> None:
    data = fake_data(captions)
    order = epoch_order(data.lengths, 8, 0, 0)
    alone = list(data.batches(order, 0, 1))
    shared = [list(data.batches(order, rank, workers)) for rank in range(workers)]
    assert {len(batches) for batches in shared} == {len(alone)}
    for step, batch in enumerate(alone):
        parts = [batches[step] for batches in shared]
        assert sorted(captions_in(batch)) == sorted(sum(map(captions_in, parts), []))
        assert {part.global_targets for part in parts} == {batch.global_targets}
        assert sum(int((part.tokens[:, 1:] != PAD).sum()) for part in parts) == batch.global_targets
    if captions == 41:
        assert captions_in(shared[-1][[len(batch) for batch in order].index(1)]) == []


def test_validation_order_is_fixed_and_complete() -> None:
    lengths = fake_data(30).lengths
    order = sequential_order(lengths, 8)
    assert sorted(np.concatenate(order)) == list(range(30))
    assert (np.diff(lengths[np.concatenate(order)]) >= 0).all()


def test_captions_travel_with_the_features_of_their_image(tmp_path: Path) -> None:
    data = load(tmp_path)
    assert len(data) == 21
    store = FeatureStore.open(str(tmp_path))
    words = Vocabulary.build(
        [clean(text) for texts in store.captions("train").values() for text in texts]
    ).words
    for batch in data.batches(epoch_order(data.lengths, 4, 0, 0), 0, 1):
        assert batch.tokens.dtype == torch.int64
        assert batch.features["pooled"].dtype == torch.float32
        animals = batch.features["pooled"].argmax(dim=1)
        for row, animal in zip(batch.tokens, animals, strict=True):
            assert words[row[2]] == ANIMALS[animal]


def test_long_captions_are_cut_and_stay_closed(tmp_path: Path) -> None:
    data = load(tmp_path)
    assert data.lengths.max() == 6
    for batch in data.batches(sequential_order(data.lengths, 64), 0, 1):
        ends = (batch.tokens == END).sum(dim=1)
        assert (batch.tokens[:, 0] == START).all()
        assert ends.tolist() == [1] * len(batch.tokens)


def test_rejected_images_are_left_out(tmp_path: Path) -> None:
    assert len(load(tmp_path, "validation").columns["pooled"]) == 3


def test_grid_stays_float16_in_memory_and_arrives_as_float32(tmp_path: Path) -> None:
    data = load(tmp_path, columns=("grid",))
    assert data.columns["grid"].dtype == torch.float16
    batch = next(data.batches(sequential_order(data.lengths, 4), 0, 1))
    assert batch.features["grid"].dtype == torch.float32
    assert batch.features["grid"].shape == (4, GRID_CELLS, CHANNELS)


@pytest.mark.parametrize("column", ["pooled", "grid"])
def test_statistics_are_those_of_all_images(tmp_path: Path, column: str) -> None:
    data = load(tmp_path, columns=(column,))
    values = data.columns[column].numpy().astype(np.float64).reshape(-1, CHANNELS)
    mean, deviation = data.statistics(column)
    np.testing.assert_allclose(mean.numpy(), values.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(deviation.numpy(), values.std(axis=0), rtol=1e-4)
