"""The self-critical objective: its gradient is that of the expected reward, in any number of parts."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from captioner.config import DecoderConfig, OptimizerConfig, TrainConfig
from captioner.decoders import build_decoder
from captioner.decoders.ensemble import Ensemble
from captioner.encoders.spec import FeatureShape
from captioner.text import END, START
from captioner.training.data import CaptionData, Pass
from captioner.training.history import EpochRecord, finished
from captioner.training.references import References
from captioner.training.resident import Resident
from captioner.training.self_critical import SelfCritical
from captioner.training.steps import train_step

CHANNELS, WORDS = 3, 12
SHAPE = FeatureShape(CHANNELS, CHANNELS, 2, 2)
CONFIG = TrainConfig(
    features="f",
    output="o",
    init="m",
    objective="self_critical",
    samples=4,
    global_batch=8,
    optimizer=OptimizerConfig(clip_norm=None),
)


def decoder(seed: int = 0, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(seed)
    return build_decoder(DecoderConfig(width=8, output_width=8, dropout=dropout), WORDS, SHAPE)


def split(images: int = 4, rank: int = 0, workers: int = 1) -> Resident:
    generator = np.random.default_rng(1)
    captions = [
        [START, *generator.integers(4, WORDS, generator.integers(2, 6)).tolist(), END]
        for _ in range(3 * images)
    ]
    data = CaptionData(captions, np.repeat(np.arange(images), 3))
    pooled = torch.from_numpy(generator.normal(size=(images, CHANNELS)).astype(np.float32))
    return Resident(data, [{"pooled": pooled}], CONFIG, rank, workers)


def objective(model: nn.Module, data: Resident, samples: int = 4) -> SelfCritical:
    return SelfCritical(model, References(data.data), samples, max_length=5).train()  # type: ignore[arg-type]


def test_a_step_has_so_many_images_that_it_draws_a_global_batch() -> None:
    found: Pass = split().epoch(0)
    assert [len(share) for (share,) in found.plan] == [2, 2]
    assert sorted(int(image) for batch in found for image in batch.images) == [0, 1, 2, 3]
    # Validation is over every caption all the same.
    assert sum(share.size for (share,) in split().ordered().plan) == 12


def test_gradient_is_that_of_the_expected_reward() -> None:
    """One word of captions cut after one: the expectation is a sum over the vocabulary, and so is its gradient."""
    data, model = split(1), decoder()
    references = References(data.data)
    batch = next(iter(data.epoch(0)))
    drawing = SelfCritical(model, references, 20_000, max_length=0).train()  # type: ignore[arg-type]
    torch.manual_seed(0)
    loss, reward = drawing(batch.features, batch.tokens, batch.images)
    loss.backward()
    sampled = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    exact = decoder()
    state = exact.start(batch.features)  # type: ignore[operator]
    logits, _, _ = exact.step(torch.tensor([START]), state)  # type: ignore[operator]
    logits = logits.index_fill(1, torch.tensor([0, START, 3]), -torch.inf)
    words = np.arange(WORDS)[None, :, None]
    rewards = torch.from_numpy(references.scores(np.array([0]), words)[0]).float()
    expected = (torch.softmax(logits[0], dim=0) * rewards).sum()
    (-expected).backward()
    wanted = torch.cat([p.grad.flatten() for p in exact.parameters() if p.grad is not None])
    assert float(reward) == pytest.approx(float(expected.detach()), rel=0.05)
    assert torch.cosine_similarity(sampled, wanted, dim=0) > 0.99
    assert float(sampled.norm() / wanted.norm()) == pytest.approx(1, rel=0.1)


def test_an_idle_worker_has_no_gradient() -> None:
    data = split(3)
    data.rank, data.workers = 1, 2
    (idle,) = (batch for batch in data.epoch(0) if batch.images.tolist() == [-1])
    model = objective(decoder(), data)
    loss, reward = model(idle.features, idle.tokens, idle.images)
    loss.backward()
    assert float(reward) == 0.0
    assert all(float(p.grad.abs().sum()) == 0 for p in model.parameters() if p.grad is not None)


def test_members_of_an_ensemble_draw_their_own_captions() -> None:
    data = split()
    batch = next(iter(data.epoch(0)))
    together = Ensemble([decoder(1), decoder(2)])  # type: ignore[list-item]
    torch.manual_seed(3)
    loss, reward = objective(together, data)(batch.features, batch.tokens, batch.images)
    torch.manual_seed(3)
    parts = [
        objective(decoder_, data)(batch.features, batch.tokens, batch.images)
        for decoder_ in together.decoders
    ]
    wanted = [float(sum(one[place].detach() for one in parts)) / 2 for place in (0, 1)]
    assert [float(loss.detach()), float(reward)] == pytest.approx(wanted)


def test_rewards_rise() -> None:
    data, network = split(), decoder(dropout=0.1)
    model = objective(network, data, samples=8)
    optimizer = torch.optim.Adam(network.parameters(), 0.02)

    def step(epoch: int) -> Tensor:
        rewards = [
            train_step(
                model, optimizer, batch, seed=(0, epoch, number), workers=1, config=CONFIG, compute="float32"
            )[1]
            for number, batch in enumerate(data.epoch(epoch))
        ]  # fmt: skip
        return torch.stack(rewards).sum() / 4

    rewards = [float(step(epoch)) for epoch in range(60)]
    assert np.mean(rewards[-5:]) > 2 * np.mean(rewards[:5])


def test_patience_is_of_the_cider() -> None:
    record = EpochRecord(
        epoch=1, train_loss=None, train_accuracy=None, train_cider=0.3, validation_loss=1.0, validation_accuracy=0.0,
        validation_cider=0.5, learning_rate=0.01, seconds=1.0, captions_per_second=1.0, data_wait_fraction=0.0,
    )  # fmt: skip
    config = CONFIG.model_copy(update={"patience": 2, "epochs": 9})
    history = [
        record.model_copy(update={"validation_loss": 1.0 + number, "validation_cider": cider})
        for number, cider in enumerate((0.5, 0.6, 0.7))
    ]
    assert not finished(history, config)
    worse = [record.model_copy(update={"validation_cider": 0.1})] * 2
    assert not finished([*history, worse[0]], config)
    assert finished([*history, *worse], config)


def test_parts_of_a_batch_know_their_images() -> None:
    data = split()
    batch = next(iter(replace(data.epoch(0), plan=[[np.arange(0, 12, 3)[:, None]]])))
    assert [part.images.tolist() for part in batch.split(3)] == [[0, 1], [2, 3]]
    assert copy.copy(batch).images.tolist() == [0, 1, 2, 3]
