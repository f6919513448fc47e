"""Training on a device with a memory of its own, for which torch's meta device stands: it has shapes and no values, so
that whatever would have to wait for one is an error.
"""

import sys
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from captioner.config import DECODER_KINDS, DecoderConfig, DecoderKind, TrainConfig
from captioner.decoders import build_decoder
from captioner.encoders.spec import FeatureShape
from captioner.text import END, PAD, START
from captioner.training import steps
from captioner.training.data import Batch, on_device
from captioner.training.state import TrainingState
from captioner.training.steps import TeacherForcing, train_step

WORDS, SHAPE, IMAGES = 30, FeatureShape(6, 6, 2, 2), 5
META = torch.device("meta")


class Copies(TorchDispatchMode):
    """Counts what goes from the host's memory to the device's."""

    def __init__(self) -> None:
        super().__init__()
        self.to_device = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        gave = [one for one in tree_leaves(found) if isinstance(one, Tensor)]
        # A number, such as a tensor is filled with, goes along with the command.
        self.to_device += any(one.is_meta for one in gave) and any(
            one.is_cpu and one.ndim for one in given
        )
        return found


def config(**settings: Any) -> TrainConfig:
    return TrainConfig(features="unused", output="unused", ema_decay=0.9, **settings)


def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    features = {
        "pooled": torch.randn(IMAGES, *SHAPE.of("pooled"), generator=generator),
        "grid": torch.randn(IMAGES, *SHAPE.of("grid"), generator=generator),
    }
    tokens = torch.full((IMAGES, 8), PAD)
    for row in range(IMAGES):
        words = torch.randint(4, WORDS, (row + 2,), generator=generator)
        tokens[row, : row + 4] = torch.cat([torch.tensor([START]), words, torch.tensor([END])])
    captions = np.arange(IMAGES)[:, None]
    targets = int((tokens[:, 1:] != PAD).sum())
    return Batch(features, tokens, captions, np.arange(IMAGES), targets)


def run_steps(state: TrainingState, settings: TrainConfig, on: Batch, compute: str) -> Tensor:
    model = TeacherForcing(state.network, settings.label_smoothing).train()
    sums = torch.zeros(2, dtype=torch.float64, device=on.tokens.device)
    for step in range(2):
        state.before_step(0.0)
        loss, correct = train_step(
            model, state.optimizer, on, seed=(step,), workers=1, config=settings, compute=compute
        )
        state.after_step()
        sums += torch.stack([loss.double(), correct.double()])
    return sums


@pytest.mark.parametrize("kind", DECODER_KINDS)
def test_a_step_copies_nothing_from_the_device_to_the_host(
    kind: DecoderKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "autocast", lambda *_: nullcontext())
    # Torch takes its fused optimizer for devices alone that it knows to have one.
    monkeypatch.setattr(
        sys.modules["torch.optim.adam"], "_device_dtype_check_for_fused", lambda _: None
    )
    settings = config(gradient_accumulation=2, label_smoothing=0.1)
    there = batch().to(META)
    with META:
        two = DecoderConfig(kind=kind, width=16, ensemble_size=2)
        decoder = build_decoder(two, WORDS, SHAPE)
    state = TrainingState(decoder, settings, 10)
    with Copies() as copies:
        sums = run_steps(state, settings, there, "float32")
    assert copies.to_device == 0
    assert sums.is_meta
    # And had there been any of these, they would have been told.
    for wait in (sums.cpu, sums[0].item, sums.nonzero, lambda: sums[sums > 0]):
        with pytest.raises((NotImplementedError, RuntimeError)):
            wait()


@pytest.mark.parametrize("kind", DECODER_KINDS)
def test_with_its_padding_a_step_learns_the_same(
    kind: DecoderKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On GPUs padding goes through the network, for nobody could say how much there is of it."""
    settings = config()

    def learn() -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        decoder = build_decoder(
            DecoderConfig(kind=kind, width=16, dropout=0.0, feature_dropout=0.0), WORDS, SHAPE
        )
        sums = run_steps(TrainingState(decoder, settings, 10), settings, batch(), "float32")
        return sums, nn.utils.parameters_to_vector(decoder.parameters()).detach()

    wanted = learn()
    monkeypatch.setattr(steps, "packs", lambda device: False)
    monkeypatch.setattr("captioner.decoders.transformer.packs", lambda device: False)
    for one, other in zip(learn(), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_batches_for_a_device_are_read_one_ahead_in_a_thread_and_in_their_order() -> None:
    readers, read = set(), []
    first = batch()

    def batches() -> Iterator[Batch]:
        for number in range(4):
            readers.add(threading.get_ident())
            read.append(number)
            yield first.split(5)[number]

    arrived = []
    for there in on_device(batches(), META):
        assert there.tokens.device.type == there.features["grid"].device.type == "meta"
        arrived += there.images.tolist()
    assert arrived == read == [0, 1, 2, 3]
    assert readers.isdisjoint({threading.get_ident()})
    # A CPU's are read when they are asked for: nothing there could be done meanwhile.
    ours = on_device(batches(), torch.device("cpu"))
    assert next(ours).tokens.device.type == "cpu"
    assert read == [0, 1, 2, 3, 0]


def test_what_goes_wrong_in_reading_ahead_is_told_as_it_was_raised() -> None:
    def batches() -> Iterator[Batch]:
        yield batch()
        raise ValueError("a damaged file")

    there = on_device(batches(), META)
    next(there)
    with pytest.raises(ValueError, match="a damaged file"):
        next(there)
