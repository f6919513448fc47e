"""Which captions a worker sees, in which order, and with which features."""

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from captioner.artifacts.feature_store import FeatureStore
from captioner.config import TextConfig, TrainConfig
from captioner.errors import StoreError
from captioner.text import END, PAD, START, Vocabulary, clean
from captioner.training.data import Batch, CaptionData, Done
from captioner.training.ingest import Ingest, open_split
from captioner.training.plan import WINDOW, Plan, caption_units, epoch_plan, sequential_plan
from captioner.training.resident import Resident
from captioner.training.state import after_steps
from captioner.training.streaming import Streaming
from tests.stores import ANIMALS, CHANNELS, GRID, write_store

CONFIG = TrainConfig(features="unused", output="unused", global_batch=8)


def fake_data(captions: int, images: int = 5) -> CaptionData:
    """Captions of different lengths; the words of caption n are all n + 4, so that it can be recognised."""
    generator = np.random.default_rng(0)
    tokens = [
        [START, *[number + 4] * int(generator.integers(1, 12)), END] for number in range(captions)
    ]
    return CaptionData(tokens, np.arange(captions) % images)


def resident(
    data: CaptionData, rank: int = 0, workers: int = 1, config: TrainConfig = CONFIG
) -> Resident:
    images = int(data.image_rows.max()) + 1
    pooled = np.arange(images * 2, dtype=np.float32).reshape(images, 2)
    return Resident(data, [{"pooled": torch.from_numpy(pooled)}], config, rank, workers)


def captions_in(batch: Batch) -> list[int]:
    """Numbers of the captions that count in a batch."""
    return [int(row[1]) - 4 for row in batch.tokens if row[1] != PAD]


def captions_in_share(batch: Batch) -> list[int]:
    return [int(number) for number in batch.captions.ravel() if number >= 0]


def captions_of(plan: Plan) -> list[int]:
    """Numbers of all captions of a plan, in its order."""
    numbers = np.concatenate([share.ravel() for step in plan for share in step])
    return [int(number) for number in numbers if number >= 0]


def vocabulary(store: FeatureStore) -> Vocabulary:
    return Vocabulary.build(
        [clean(text) for texts in store.captions("train").values() for text in texts]
    )


def opened(
    root: Path,
    split: str = "train",
    columns: tuple[str, ...] = ("pooled",),
    rank: int = 0,
    workers: int = 1,
    memory: int = 2**40,
    **settings: object,
) -> Ingest:
    if not root.joinpath("manifest.json").exists():
        write_store(root, {"train": 7, "validation": 3}, grid=True)
    store = FeatureStore.open(str(root))
    config = CONFIG.model_copy(update={"text": TextConfig(max_length=6)} | settings)
    return open_split(
        store,
        split,
        columns,
        vocabulary(store),
        config,
        rank=rank,
        workers=workers,
        memory=memory,
    )


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("captions", [1, 7, 64, 65, 8 * WINDOW, 8 * WINDOW + 9])
def test_every_caption_comes_exactly_once_an_epoch(captions: int, grouped: bool) -> None:
    data = fake_data(captions)
    units = caption_units(data.image_rows, grouped=grouped)
    plan = epoch_plan(units, data.lengths, 8, epoch=3, seed=0, workers=1)
    assert sorted(captions_of(plan)) == list(range(captions))
    if not grouped:
        assert len(plan) == -(-captions // 8)
        assert sum(len(share) < 8 for (share,) in plan) == (captions % 8 > 0)


def test_grouped_units_hold_the_captions_of_one_image_each() -> None:
    units = caption_units(np.array([2, 0, 2, 7, 2, 0]), grouped=True)
    assert units.tolist() == [[1, 5, -1], [0, 2, 4], [3, -1, -1]]


@pytest.mark.parametrize(
    ("counts", "steps", "rows"),
    [
        ([5] * 1000, 32, 5000),
        # One picture with many captions, which once turned 32 steps into 250 and 1,000.
        ([5] * 999 + [40], 32, 5035),
        ([5] * 999 + [160], 33, 5155),
        ([160] + [5] * 999, 33, 5155),
        # COCO's.
        ([5] * 985 + [6] * 12 + [7] * 3, 32, 5080),
        ([1] * 500 + [9] * 500, 32, 8000),
        ([1] * 1000, 7, 1000),
    ],
)
@pytest.mark.parametrize("workers", [1, 2])
def test_batches_keep_their_captions_whatever_the_sizes_of_groups(
    counts: list[int], steps: int, rows: int, workers: int
) -> None:
    image_rows = np.repeat(np.arange(len(counts)), counts)
    lengths = np.random.default_rng(0).integers(5, 20, len(image_rows))
    units = caption_units(image_rows, grouped=True)
    plan = epoch_plan(units, lengths, 160, epoch=0, seed=0, workers=workers)
    assert sorted(captions_of(plan)) == list(range(len(image_rows)))
    held = sorted(sum(int((share >= 0).sum()) for share in step) for step in plan)
    assert len(plan) <= steps + 1
    # All but the last of a window and the last of all.
    assert all(abs(captions - 160) <= units.shape[1] for captions in held[2:])
    # What the decoder computes, padding included.
    assert sum(share.size for step in plan for share in step) <= rows
    for step in plan:
        for share in step:
            assert (share[:, 0] >= 0).all()
            assert all(len({int(image_rows[n]) for n in unit if n >= 0}) == 1 for unit in share)


def test_order_is_decided_by_seed_and_epoch() -> None:
    data = fake_data(100)
    units = caption_units(data.image_rows, grouped=False)

    def flat(epoch: int, seed: int) -> list[int]:
        return captions_of(epoch_plan(units, data.lengths, 8, epoch, seed, 1))

    assert flat(0, 0) == flat(0, 0)
    assert flat(0, 0) != flat(1, 0)
    assert flat(0, 0) != flat(0, 1)


def test_batches_hold_captions_of_similar_length_but_differ_between_epochs() -> None:
    data = fake_data(2000)
    units, lengths = caption_units(data.image_rows, grouped=False), data.lengths

    def padded(batches: list[np.ndarray]) -> float:
        return sum(len(batch) * lengths[batch].max() for batch in batches) / lengths.sum()

    def epoch(number: int) -> list[np.ndarray]:
        return [share.ravel() for (share,) in epoch_plan(units, lengths, 16, number, 0, 1)]

    shuffled = np.random.default_rng(0).permutation(2000)
    assert padded(epoch(0)) < 1.1 < 1.5 < padded(np.split(shuffled, 125))
    again = {frozenset(batch.tolist()) for batch in epoch(1)}
    assert not again & {frozenset(batch.tolist()) for batch in epoch(0)}


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("workers", [2, 3, 8])
@pytest.mark.parametrize("captions", [41, 48])
def test_workers_together_see_one_workers_batches(
    captions: int, workers: int, grouped: bool
) -> None:
    config = CONFIG.model_copy(update={"group_captions": grouped})
    data = fake_data(captions, images=captions // 3)

    def batches(rank: int, count: int) -> list[Batch]:
        return list(resident(data, rank, count, config).epoch(0))

    alone = batches(0, 1)
    shared = [batches(rank, workers) for rank in range(workers)]
    assert {len(found) for found in shared} == {len(alone)}
    idle = 0
    for step, batch in enumerate(alone):
        parts = [found[step] for found in shared]
        assert sorted(captions_in(batch)) == sorted(sum(map(captions_in, parts), []))
        assert {part.global_targets for part in parts} == {batch.global_targets}
        assert sum(int((part.tokens[:, 1:] != PAD).sum()) for part in parts) == batch.global_targets
        for part in parts:
            if captions_in(part) == []:
                idle += 1
                assert (part.tokens[:, 1:] == PAD).all()
                assert not any(column.any() for column in part.features.values())
            assert len(part.tokens) % len(part.features["pooled"]) == 0
    assert idle or captions == 48 or grouped


def test_validation_order_is_fixed_and_complete() -> None:
    data = fake_data(30)
    units = caption_units(data.image_rows, grouped=False)
    found = captions_of(sequential_plan(units, data.lengths, 8, 1))
    assert sorted(found) == list(range(30))
    assert (np.diff(data.lengths[found]) >= 0).all()


@pytest.mark.parametrize("ingest", ["resident", "streaming"])
@pytest.mark.parametrize("grouped", [False, True])
def test_captions_travel_with_the_features_of_their_image(
    tmp_path: Path, ingest: str, grouped: bool
) -> None:
    way = opened(tmp_path, ingest=ingest, group_captions=grouped)
    assert len(way.data) == 21
    words = vocabulary(FeatureStore.open(str(tmp_path))).words
    seen = 0
    for batch in way.epoch(0):
        assert batch.tokens.dtype == torch.int64
        assert batch.features["pooled"].dtype == torch.float32
        animals = batch.features["pooled"].argmax(dim=1)
        animals = animals.repeat_interleave(len(batch.tokens) // len(animals))
        for row, animal in zip(batch.tokens, animals, strict=True):
            assert words[row[2]] == ANIMALS[animal]
            seen += 1
    assert seen == 21


def many_files(root: Path, files: int) -> FeatureStore:
    """A store whose train split is spread over this many files."""
    return FeatureStore.open(
        write_store(root, {"train": 23, "validation": 3}, grid=True, files=files)
    )


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("epoch", [0, 1, None])
def test_streaming_gives_every_caption_once_and_the_batches_of_resident_data(
    tmp_path: Path, workers: int, grouped: bool, epoch: int | None
) -> None:
    store = many_files(tmp_path, 9)
    config = CONFIG.model_copy(update={"group_captions": grouped})
    data = CaptionData.load(store, "train", vocabulary(store), config.text)
    whole = {"grid": torch.from_numpy(store.load("train", ("grid",)).columns["grid"])}
    seen: list[int] = []
    steps = set()
    for rank in range(workers):
        # Room for about five images, so that an epoch takes several windows.
        way = Streaming(
            data,
            store,
            "train",
            ("grid",),
            ("",),
            config,
            rank,
            workers,
            5 * store.column_bytes("grid"),
        )
        assert len(way.windows(epoch, workers)) > 1
        mine = way.ordered() if epoch is None else way.epoch(epoch)
        steps.add(len(mine))
        same = Resident(data, [whole], config, rank, workers)
        held_pass = same.ordered() if epoch is None else same.epoch(epoch)
        for streamed, held in zip(mine, replace(held_pass, plan=mine.plan), strict=True):
            assert torch.equal(streamed.tokens, held.tokens)
            assert torch.equal(streamed.features["grid"], held.features["grid"])
            assert streamed.global_targets == held.global_targets
            seen += captions_in_share(streamed)
    assert sorted(seen) == list(range(len(data)))
    assert len(steps) == 1


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(
    "crews",
    [[(1, 3), (1, 99)], [(2, 2), (2, 99)], [(2, 3), (1, 2), (3, 1), (3, 99)], [(3, 0), (1, 99)]],
)
def test_an_epoch_that_is_continued_has_every_caption_once_whoever_continues_it(
    tmp_path: Path, streaming: bool, grouped: bool, crews: list[tuple[int, int]]
) -> None:
    """Crews of (workers, steps) that follow each other within the epoch, as an elastic run's do."""
    store = many_files(tmp_path, 9)
    config = CONFIG.model_copy(update={"group_captions": grouped})
    data = CaptionData.load(store, "train", vocabulary(store), config.text)
    whole = {"grid": torch.from_numpy(store.load("train", ("grid",)).columns["grid"])}

    def way(rank: int, workers: int) -> Ingest:
        if not streaming:
            return Resident(data, [whole], config, rank, workers)
        room = 5 * store.column_bytes("grid")
        return Streaming(data, store, "train", ("grid",), ("",), config, rank, workers, room)

    seen: list[int] = []
    done: list[Done] = []
    for workers, steps in crews:
        passes = [way(rank, workers).epoch(4, done) for rank in range(workers)]
        assert len({len(mine) for mine in passes}) == 1
        taken = min(steps, len(passes[0]))
        for mine in passes:
            for batch, _ in zip(mine, range(taken), strict=False):
                seen += captions_in_share(batch)
                wanted = whole["grid"][data.image_rows[batch.captions[:, 0]]].float()
                if captions_in_share(batch):
                    assert torch.equal(batch.features["grid"], wanted)
        if done and done[-1].workers == workers:
            # To the byte what the same workers would have had without a break.
            rest = passes[0].plan
            unbroken = way(0, workers).epoch(4, done[:-1]).plan[done[-1].steps :]
            assert len(rest) == len(unbroken)
            for one, two in zip(rest, unbroken, strict=True):
                assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
        done = after_steps(done, taken, workers)
    assert sorted(seen) == list(range(len(data)))


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("epoch", [0, None])
def test_streaming_keeps_every_worker_busy(tmp_path: Path, workers: int, epoch: int | None) -> None:
    store = FeatureStore.open(write_store(tmp_path, {"train": 300}, files=100))
    data = CaptionData.load(store, "train", vocabulary(store), CONFIG.text)
    # The whole split is a small part of one window.
    way = Streaming(data, store, "train", ("pooled",), ("",), CONFIG, 0, workers)
    plan = (way.ordered() if epoch is None else way.epoch(epoch)).plan
    shares = np.array([[len(share) for share in step] for step in plan])
    assert shares.sum() == len(data)
    assert (shares.sum(axis=0) > 0.9 * len(data) / workers).all()
    # Eight captions a step, over all workers.
    assert len(plan) <= 1.1 * len(data) / (CONFIG.global_batch // workers * workers) + 1


@pytest.mark.parametrize("ingest", ["resident", "streaming"])
def test_images_without_captions_are_passed_over(tmp_path: Path, ingest: str) -> None:
    write_store(tmp_path, {"train": 20, "validation": 3}, uncaptioned=2, files=7)
    way = opened(tmp_path, ingest=ingest)
    seen = [number for batch in way.epoch(0) for number in captions_in_share(batch)]
    assert sorted(seen) == list(range(18 * 3))


def test_captions_come_in_the_order_of_images_and_of_their_places(tmp_path: Path) -> None:
    store = FeatureStore.open(write_store(tmp_path, {"train": 30}, uncaptioned=1))
    words = vocabulary(store)
    data = CaptionData.load(store, "train", words, CONFIG.text)
    rows = {name: row for row, name in enumerate(store.image_ids("train"))}
    wanted = [
        (rows[name], words.encode(clean(text)))
        for name, texts in store.captions("train").items()
        for text in texts
    ]
    found = [(int(row), data.caption(number)) for number, row in enumerate(data.image_rows)]
    assert found == wanted


def test_captions_of_rejected_images_alone_are_none(tmp_path: Path) -> None:
    store = FeatureStore.open(write_store(tmp_path, {"train": 3}, uncaptioned=3))
    told = store.manifest.splits["train"].model_copy(update={"captions": 1})
    store.manifest.splits["train"] = told
    for read in (store.captions, lambda split: list(store.caption_batches(split))):
        with pytest.raises(StoreError, match="no captions in split 'train'"):
            read("train")


def test_streaming_order_differs_between_epochs_alone(tmp_path: Path) -> None:
    store = many_files(tmp_path, 9)
    data = CaptionData.load(store, "train", vocabulary(store), CONFIG.text)
    way = Streaming(
        data, store, "train", ("grid",), ("",), CONFIG, 0, 1, 5 * store.column_bytes("grid")
    )
    assert (
        captions_of(way.epoch(0).plan)
        == captions_of(way.epoch(0).plan)
        != captions_of(way.epoch(1).plan)
    )


def test_long_captions_are_cut_and_stay_closed(tmp_path: Path) -> None:
    way = opened(tmp_path)
    assert way.data.lengths.max() == 6
    for batch in way.ordered():
        ends = (batch.tokens == END).sum(dim=1)
        assert (batch.tokens[:, 0] == START).all()
        assert ends.tolist() == [1] * len(batch.tokens)


def test_rejected_images_are_left_out(tmp_path: Path) -> None:
    way = opened(tmp_path, "validation")
    assert isinstance(way, Resident)
    assert len(way.views[0]["pooled"]) == 3


def test_grid_stays_float16_in_memory_and_arrives_as_float32(tmp_path: Path) -> None:
    way = opened(tmp_path, columns=("grid",))
    assert isinstance(way, Resident)
    assert way.views[0]["grid"].dtype == torch.float16
    batch = next(iter(way.ordered()))
    assert batch.features["grid"].dtype == torch.float32
    assert batch.features["grid"].shape == (8, GRID[0] * GRID[1], CHANNELS)


def maps_of(way: Ingest) -> str:
    """The line of /proc/self/maps about the pooled vectors of a resident split."""
    assert isinstance(way, Resident)
    place = way.views[0]["pooled"].data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(number, 16) for number in line.split()[0].split("-"))
        if start <= place < end:
            return line
    raise AssertionError("nowhere")


def test_features_over_half_of_the_memory_lie_on_the_disk(tmp_path: Path) -> None:
    # Each first in its own store: what is at hand already is shared, wherever it lies.
    size = 7 * 4 * CHANNELS
    held = opened(tmp_path / "held", memory=2 * size)
    write_store(tmp_path / "mapped", {"train": 7, "validation": 3}, grid=True, seed=1)
    mapped = opened(tmp_path / "mapped", memory=2 * size - 1)
    assert "/memfd:captioner-" in maps_of(held)
    assert f"{tempfile.gettempdir()}/captioner-" in maps_of(mapped)
    assert "(deleted)" in maps_of(mapped)
    for way, place in ((held, "held"), (mapped, "mapped")):
        table = FeatureStore.open(str(tmp_path / place)).load("train", ("pooled",))
        assert isinstance(way, Resident)
        np.testing.assert_array_equal(way.views[0]["pooled"].numpy(), table.columns["pooled"])


@pytest.mark.parametrize("ingest", ["resident", "streaming"])
@pytest.mark.parametrize("column", ["pooled", "grid"])
def test_statistics_are_those_of_all_images(tmp_path: Path, column: str, ingest: str) -> None:
    way = opened(tmp_path, columns=(column,), ingest=ingest)
    loaded = FeatureStore.open(str(tmp_path)).load("train", (column,)).columns[column]
    values = loaded.astype(np.float64).reshape(-1, CHANNELS)
    mean, deviation = way.statistics(column)
    np.testing.assert_allclose(mean.numpy(), values.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(deviation.numpy(), values.std(axis=0), rtol=1e-4)


@pytest.mark.parametrize("ingest", ["resident", "streaming"])
@pytest.mark.parametrize(("mirrored", "crops"), [(True, 0), (False, 1), (True, 2)])
def test_an_epoch_shows_one_view_of_each_image_and_another_epoch_others(
    tmp_path: Path, ingest: str, mirrored: bool, crops: int
) -> None:
    images = 60
    store = FeatureStore.open(
        write_store(tmp_path, {"train": images, "validation": 9}, mirrored=True, crops=3)
    )
    own = {split: store.load(split, ("pooled",)).columns["pooled"] for split in store.manifest.splits}  # fmt: skip

    def shown(split: str, epoch: int | None) -> list[float]:
        """By image: -1 the mirror image, 1 itself, 2 the first crop ..."""
        way = opened(tmp_path, split, ingest=ingest, mirrored=mirrored, crops=crops)
        found: dict[int, float] = {}
        for batch in way.ordered() if epoch is None else way.epoch(epoch):
            for image, vector in zip(
                way.data.image_rows[batch.captions[:, 0]].tolist(),
                batch.features["pooled"].numpy(),
                strict=True,
            ):
                factor = float(np.median(vector / own[split][image]))
                np.testing.assert_allclose(vector, factor * own[split][image], rtol=1e-5)
                assert found.setdefault(image, factor) == factor
        return [round(found[image], 3) for image in sorted(found)]

    first = shown("train", 0)
    wanted = {1.0, *([-1.0] if mirrored else []), *(2.0 + number for number in range(crops))}
    assert set(first) == wanted
    for view in wanted:
        assert 0.5 < first.count(view) * len(wanted) / images < 1.6
    assert first == shown("train", 0) != shown("train", 1)
    assert set(shown("validation", None)) == set(shown("train", None)) == {1.0}


def test_views_that_are_not_there_are_named(tmp_path: Path) -> None:
    store = FeatureStore.open(write_store(tmp_path, {"train": 3}, crops=1))
    store.require("train", ("pooled",), captions=True, crops=1)
    with pytest.raises(StoreError, match="holds 1 crops of each image: extract with --crops 2"):
        store.require("train", ("pooled",), captions=True, crops=2)
    with pytest.raises(StoreError, match="no mirrored images: extract with --mirrored"):
        store.require("train", ("pooled",), captions=True, mirrored=True)


def test_crops_that_are_mirrored_in_part_want_mirrored_training(tmp_path: Path) -> None:
    store = FeatureStore.open(write_store(tmp_path, {"train": 3}, mirrored=True, crops=2))
    store.require("train", ("pooled",), captions=True, mirrored=True, crops=2)
    store.require("train", ("pooled",), captions=True)
    with pytest.raises(StoreError, match="crops that are mirrored in part: train with --mirrored"):
        store.require("train", ("pooled",), captions=True, crops=2)


def test_captions_without_words_are_not_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FeatureStore.open(write_store(tmp_path, {"train": 2}, captions_per_image=1))
    words = vocabulary(store)
    rows, numbers = np.array([0, 0, 1]), np.array([0, 1, 0])

    def batches(texts: list[str]) -> None:
        monkeypatch.setattr(
            FeatureStore, "caption_batches", lambda store, split: iter([(rows, numbers, texts)])
        )

    batches(["...", "A dog.", "\U0001f44d"])
    data = CaptionData.load(store, "train", words, CONFIG.text)
    assert len(data) == 1
    assert data.image_rows.tolist() == [0]
    assert words.decode(data.caption(0)) == "a dog"
    batches(["...", "!", ""])
    with pytest.raises(StoreError, match="no caption of the train split has a word"):
        CaptionData.load(store, "train", words, CONFIG.text)
