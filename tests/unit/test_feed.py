"""Extraction's feed of a device, by the very code that feeds a GPU: the same views, the same vectors, in threads too,
and batches no larger than memory holds.
"""

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Barrier

import numpy as np
import pyarrow as pa
import pytest
import safetensors.torch
import torch
from torch import Tensor

from captioner.config import EncoderConfig, ImageLimits
from captioner.encoders.family import family_of
from captioner.encoders.feed import Feed
from captioner.encoders.views import cut_views
from captioner.features.encode import EncodeImages
from captioner.features.stage import PIXELS
from captioner.images.load import Pixels
from captioner.images.views import other_views, view_names

CPU = Feed(torch.device("cpu"))
IDS = [f"{number}.jpg" for number in range(40)]
SIDE = 32


def noise(rows: int, columns: int, count: int = len(IDS)) -> Pixels:
    return np.random.default_rng(0).integers(0, 256, (count, rows, columns, 3), np.uint8)


@pytest.mark.parametrize("size", [(224, 224), (33, 70), (7, 2), (1, 1)])
@pytest.mark.parametrize("mirrored", [False, True])
def test_views_cut_on_a_device_are_pillows_to_the_byte(
    size: tuple[int, int], mirrored: bool
) -> None:
    images = noise(*size)
    wanted = dict(other_views(images, IDS, mirrored=mirrored, crops=3))
    found = dict(cut_views(torch.from_numpy(images), IDS, CPU, mirrored=mirrored, crops=3))
    assert list(found) == list(wanted)
    for name, pixels in found.items():
        np.testing.assert_array_equal(pixels.numpy(), wanted[name], name)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> EncodeImages:
    config = EncoderConfig(weights="random", layer="layer3", input_size=SIDE)
    family, _ = family_of(config.name)
    tensors, _ = family.weights(config)
    weights = tmp_path_factory.mktemp("weights") / "encoder.safetensors"
    weights.write_bytes(safetensors.torch.save(tensors))
    spec = family.spec(config, tensors, "float32")
    found = EncodeImages(str(weights), spec, ImageLimits(), grid=True, mirrored=True, crops=2)
    found.prepare()
    return found


def batch(images: Pixels, ids: list[str]) -> pa.Table:
    # As from Ray's object store, where nobody may write.
    images.setflags(write=False)
    pixels = pa.FixedShapeTensorArray.from_numpy_ndarray(images)
    return pa.table({"image_id": ids, PIXELS: pixels})


def test_vectors_of_views_cut_on_a_device_are_those_of_pillows(
    stage: EncodeImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = batch(noise(SIDE, SIDE, 9), IDS[:9])
    wanted = stage(images)
    suffixes = ["", *view_names(mirrored=True, crops=2)]
    assert wanted.column_names == [
        f"{name}{end}" for end in suffixes for name in ("pooled", "grid")
    ]
    monkeypatch.setattr("captioner.encoders.views.other_views", cut_views)
    assert stage(images).equals(wanted)
    assert not wanted["pooled"].equals(wanted["pooled_crop1"])


def test_a_compiled_network_gives_the_same_vectors(
    stage: EncodeImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the compiler makes of it takes its C++ compiler minutes: here, torch's own operations."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    with monkeypatch.context() as patch:
        patch.setattr(stage, "runtime", "compiled")
        patch.setattr(stage, "encoder", None)
        compiled = copy.copy(stage)
        compiled.prepare()
    images = batch(noise(SIDE, SIDE, 5), IDS[:5])
    wanted, found = stage(images), compiled(images)
    assert type(compiled.encoder.network) is not type(stage.encoder.network)
    for name in wanted.column_names:
        one, other = (table[name].combine_chunks().to_numpy_ndarray() for table in (wanted, found))
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3)


def test_calls_at_the_same_time_give_each_its_own_vectors(
    stage: EncodeImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [
        batch(noise(SIDE, SIDE)[at : at + 8].copy(), IDS[at : at + 8]) for at in (0, 8, 16, 24)
    ]
    wanted = [stage(part) for part in parts]
    # Two calls are at work at the same time, or this would wait for ever.
    together = Barrier(2, timeout=60)
    put = Feed.put
    monkeypatch.setattr(Feed, "put", lambda feed, array: (together.wait(), put(feed, array))[1])
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(stage, parts))
    assert all(one.equals(other) for one, other in zip(found, wanted, strict=True))


class Small(torch.nn.Module):
    """The network of a device whose memory holds so many pictures at a time."""

    def __init__(self, network: torch.nn.Module, most: int):
        super().__init__()
        self.network, self.most = network, most
        self.sizes: list[int] = []

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        self.sizes.append(len(pixels))
        if len(pixels) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        found: tuple[Tensor, Tensor] = self.network(pixels)
        return found


@pytest.fixture
def small(stage: EncodeImages) -> Iterator[Callable[[int], tuple[EncodeImages, Small]]]:
    network = stage.encoder.network

    def make(most: int) -> tuple[EncodeImages, Small]:
        found = copy.copy(stage)
        found.encoder.network = Small(network, most)
        return found, found.encoder.network

    yield make
    stage.encoder.network = network


def test_a_batch_that_memory_does_not_hold_is_halved_until_it_does(
    stage: EncodeImages, small: Callable[[int], tuple[EncodeImages, Small]]
) -> None:
    # On a CPU the network is handed eight at a time.
    images = batch(noise(SIDE, SIDE, 8), IDS[:8])
    wanted = stage(images)
    holds_three, network = small(3)
    assert holds_three(images).column_names == wanted.column_names
    views = 1 + len(view_names(mirrored=True, crops=2))
    assert network.sizes == [8, 4, *[2] * views * 4]
    # What was learnt holds for the next batch.
    network.sizes.clear()
    found = holds_three(images)
    assert network.sizes == [2] * views * 4
    for name in wanted.column_names:
        one, other = (table[name].combine_chunks().to_numpy_ndarray() for table in (wanted, found))
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3)


def test_memory_that_holds_no_picture_is_told(
    small: Callable[[int], tuple[EncodeImages, Small]],
) -> None:
    holds_none, network = small(0)
    with pytest.raises(torch.OutOfMemoryError):
        holds_none(batch(noise(SIDE, SIDE, 3), IDS[:3]))
    assert network.sizes == [3, 1]


def test_what_is_fetched_is_the_callers_own() -> None:
    there = CPU.put(np.arange(6).reshape(2, 3))
    found = CPU.fetch({"one": there, "two": there.float()})
    there.zero_()
    np.testing.assert_array_equal(found["one"], [[0, 1, 2], [3, 4, 5]])
    assert found["two"].dtype == np.float32
