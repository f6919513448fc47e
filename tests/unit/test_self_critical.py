"""Captions drawn from a decoder, their rewards, and a step that makes the better ones more probable."""

import numpy as np
import pytest
import torch
from pycocoevalcap.cider.cider import Cider as Reference

from captioner.config import DecoderConfig, SelfCriticalConfig, TrainConfig
from captioner.models import DECODERS, build_decoder
from captioner.models.sampling import sample
from captioner.text import END, PAD, START
from captioner.training.data import CaptionData
from captioner.training.ingest import Resident
from captioner.training.reward import Cider
from captioner.training.self_critical import Critic, self_critical_step
from captioner.training.steps import TeacherForcing, train_step

WORDS, CHANNELS = 12, 4


def test_reward_is_pycocoevalcaps_cider() -> None:
    generator = np.random.default_rng(0)

    def caption() -> list[int]:
        return generator.integers(4, 30, generator.integers(1, 12)).tolist()

    references = [[caption() for _ in range(5)] for _ in range(40)]
    found = [captions[0][:4] + caption() for captions in references]
    as_text = {
        number: [" ".join(map(str, caption)) for caption in captions]
        for number, captions in enumerate(references)
    }
    _, expected = Reference().compute_score(
        as_text, {number: [" ".join(map(str, words))] for number, words in enumerate(found)}
    )
    cider = Cider(references)
    got = [cider.score(number, words) for number, words in enumerate(found)]
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    assert cider.score(3, []) == 0.0


def decoder(kind: str, dropout: float = 0.0) -> torch.nn.Module:
    torch.manual_seed(0)
    config = DecoderConfig(
        kind=kind, width=16, output_width=16, attention_width=8, heads=4, layers=1, dropout=dropout
    )
    return build_decoder(config, WORDS, CHANNELS).eval()


def features(images: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "pooled": torch.randn(images, CHANNELS, generator=generator),
        "grid": torch.randn(images, 49, CHANNELS, generator=generator),
    }


@pytest.mark.parametrize("kind", sorted(DECODERS))
def test_samples_follow_the_decoders_own_distribution(kind: str) -> None:
    model = decoder(kind)
    torch.manual_seed(1)
    drawn = sample(model, features(2), 4000, 6)
    assert drawn.shape[0] == 8000
    assert (drawn[:, 0] == START).all()
    # Nothing but padding follows an end, and nothing impossible is drawn.
    ended = (drawn == END).cumsum(dim=1) - (drawn == END).long() > 0
    assert (drawn[ended] == PAD).all()
    assert not (drawn[:, 1:][~ended[:, 1:]] < 2).any()
    logits = model(features(2), torch.tensor([[START], [START]]))[:, 0]
    logits[:, [PAD, START, 3]] = -torch.inf
    expected = torch.softmax(logits, dim=-1)
    for image in range(2):
        first = drawn[image * 4000 : (image + 1) * 4000, 1]
        shares = torch.bincount(first, minlength=WORDS) / 4000
        torch.testing.assert_close(shares, expected[image], atol=0.03, rtol=0)


@pytest.mark.parametrize("kind", sorted(DECODERS))
def test_gradient_is_of_the_distribution_that_captions_were_drawn_from(kind: str) -> None:
    tokens = [[START, 4 + image, 6, END] for image in range(3)]
    data = CaptionData(tokens, np.arange(3))
    columns = {name: column.numpy() for name, column in features(3).items()}
    way = Resident(data, columns, TrainConfig(features="unused", output="unused"), 0, 1)
    critic = Critic(data, SelfCriticalConfig(samples=16, max_length=6))
    moved = []
    for dropout in (0.0, 0.5):
        model = TeacherForcing(decoder(kind, dropout))
        torch.manual_seed(1)
        (batch,) = way.batches(way.plan(0, images=3), 0)
        self_critical_step(
            model,
            torch.optim.SGD(model.parameters(), 0.1),
            batch.features,
            batch,
            critic,
            workers=1,
            clip_norm=None,
            compute="float32",
        )
        moved.append(torch.cat([weight.flatten() for weight in model.parameters()]))
    torch.testing.assert_close(moved[1], moved[0], rtol=0, atol=0)
    assert not torch.equal(
        moved[0], torch.cat([weight.flatten() for weight in decoder(kind).parameters()])
    )


@pytest.mark.parametrize("kind", ["merge", "transformer"])
def test_steps_raise_the_reward_of_greedy_captions(kind: str) -> None:
    # Three images, told apart by their features, with captions that have nothing in common.
    tokens = [[START, *range(4 + 2 * image, 6 + 2 * image), 10, END] for image in range(3)] * 2
    data = CaptionData(tokens, np.array([0, 1, 2, 0, 1, 2]))
    columns = {name: 3 * column.numpy() for name, column in features(3).items()}
    config = TrainConfig(features="unused", output="unused")
    way = Resident(data, columns, config, 0, 1)
    model = TeacherForcing(decoder(kind))
    critic = Critic(data, SelfCriticalConfig(samples=8, max_length=6))
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    # A little teacher forcing first: from nothing, the first caption that is rewarded would be drawn for every image.
    for _ in range(25):
        for batch in way.batches(way.plan(0), 0):
            train_step(
                model,
                optimizer,
                batch.features,
                batch.tokens,
                global_targets=batch.global_targets,
                workers=1,
                config=config,
                compute="float32",
            )
    torch.manual_seed(2)
    optimizer = torch.optim.AdamW(model.parameters(), 0.002)
    rewards = []
    for _ in range(60):
        for batch in way.batches(way.plan(0, images=3), 0):
            total, count = self_critical_step(
                model,
                optimizer,
                batch.features,
                batch,
                critic,
                workers=1,
                clip_norm=5.0,
                compute="float32",
            )
            assert count == 24
            rewards.append(float(total / count))
    assert np.mean(rewards[-10:]) > 1.2 * np.mean(rewards[:5])
    greedy, images = critic.greedy(model.decoder.eval(), features_of(columns), [0, 1, 2])
    assert images == 3
    assert float(greedy) / 3 > np.mean(rewards[:5])


def features_of(columns: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(column) for name, column in columns.items()}


def test_a_worker_without_images_changes_nothing() -> None:
    data = CaptionData([[START, 4, END], [START, 5, END]], np.array([0, 1]))
    config = TrainConfig(features="unused", output="unused")
    columns = {"pooled": np.ones((2, CHANNELS), np.float32)}
    idle = Resident(data, columns, config, rank=2, workers=3)
    model = TeacherForcing(decoder("merge"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    (batch,) = idle.batches(idle.plan(0, images=2), 0)
    critic = Critic(data, SelfCriticalConfig(samples=2))
    result = self_critical_step(
        model,
        torch.optim.SGD(model.parameters(), 1.0),
        batch.features,
        batch,
        critic,
        workers=3,
        clip_norm=None,
        compute="float32",
    )
    assert result.tolist() == [0.0, 0.0]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
