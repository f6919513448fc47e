"""Captions drawn from a decoder, their rewards, and a step that makes the better ones more probable."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from captioner.config import DecoderConfig, SelfCriticalConfig, TrainConfig
from captioner.decoders import DECODERS, build_decoder
from captioner.decoders.ensemble import Ensemble
from captioner.decoding.sampling import sample
from captioner.text import END, PAD, START, UNK
from captioner.training.data import Batch, CaptionData
from captioner.training.ingest import Resident
from captioner.training.self_critical import Critic, Drawing, self_critical_step
from captioner.training.steps import TeacherForcing, autocast, train_step

WORDS, CHANNELS = 12, 4


def decoder(kind: str, dropout: float = 0.0) -> torch.nn.Module:
    torch.manual_seed(0)
    config = DecoderConfig(
        kind=kind,
        width=16,
        output_width=16,
        attention_width=8,
        heads=4,
        layers=1,
        picture_layers=1,
        dropout=dropout,
        feature_dropout=dropout,
    )
    return build_decoder(config, WORDS, CHANNELS).eval()


def features(images: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "pooled": torch.randn(images, CHANNELS, generator=generator),
        "grid": torch.randn(images, 49, CHANNELS, generator=generator),
    }


def way_of(tokens: list[list[int]], images: list[int], rank: int = 0, workers: int = 1) -> Resident:
    """Captions of images, each told apart by its features."""
    columns = {name: column.numpy() for name, column in features(max(images) + 1).items()}
    config = TrainConfig(features="unused", output="unused")
    return Resident(CaptionData(tokens, np.array(images)), columns, config, rank, workers)


def take_step(
    drawing: Drawing,
    batch: Batch,
    critic: Critic,
    optimizer: torch.optim.Optimizer,
    *,
    workers: int = 1,
    compute: str = "float32",
) -> tuple[float, float, float]:
    """Reward, captions and loss of one unclipped step."""
    reward, captions, loss = self_critical_step(
        drawing,
        optimizer,
        batch.features,
        batch,
        critic,
        workers=workers,
        clip_norm=None,
        compute=compute,
    ).tolist()
    return reward, captions, loss


@pytest.mark.parametrize("kind", sorted(DECODERS))
def test_samples_follow_the_decoders_own_distribution(kind: str) -> None:
    model = decoder(kind)
    torch.manual_seed(1)
    drawn, log_probs = sample(model, features(2), 4000, 6)
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
    # The log-probabilities are those of the whole captions under teacher forcing.
    every = model(features(2), drawn[:, :-1])
    every[:, :, [PAD, START, UNK]] = -torch.inf
    wanted = torch.log_softmax(every, dim=-1).gather(2, drawn[:, 1:, None]).squeeze(2)
    real = drawn[:, 1:] != PAD
    torch.testing.assert_close(log_probs[real], wanted[real], rtol=1e-4, atol=1e-5)
    assert not log_probs[~real].any()


@pytest.mark.parametrize("kind", ["merge", "adaptive_attention"])
def test_gradient_is_that_of_the_expected_reward(kind: str) -> None:
    way = way_of([[START, 4 + image, 6, END] for image in range(2)], [0, 1])
    critic = Critic(way.data, SelfCriticalConfig(samples=20_000, max_length=1))
    (batch,) = way.batches(way.plan(0, images=2), 0)
    # Every caption of at most two words, its probability and its reward.
    model = decoder(kind)
    allowed = [word for word in range(WORDS) if word not in (PAD, START, UNK)]
    pairs = [(first, second) for first in allowed if first != END for second in allowed]
    captions = torch.tensor([[START, END, PAD], *([START, *pair] for pair in pairs)])
    expected = torch.zeros(())
    for row, image in enumerate(critic.images(batch)):
        one = {name: column[row : row + 1] for name, column in batch.features.items()}
        every = model(one, captions[:, :-1])
        every[:, :, [PAD, START, UNK]] = -torch.inf
        log_probs = torch.log_softmax(every, dim=-1).gather(2, captions[:, 1:, None]).squeeze(2)
        log_probs = torch.where(captions[:, 1:] == PAD, 0.0, log_probs)
        rewards = [
            critic.reward(image, [word for word in caption if word != PAD])
            for caption in captions[:, 1:].tolist()
        ]
        expected = expected + log_probs.sum(dim=1).exp() @ torch.tensor(rewards)
    wanted = torch.autograd.grad(expected, list(model.parameters()))
    before = [weight.detach().clone() for weight in model.parameters()]
    drawing = Drawing(model, critic.settings).train()
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(drawing.parameters(), batch.global_targets / 20_000)
    take_step(drawing, batch, critic, optimizer)
    moved = [new.detach() - old for new, old in zip(model.parameters(), before, strict=True)]
    flat, found = (torch.cat([part.flatten() for part in parts]) for parts in (wanted, moved))
    assert torch.cosine_similarity(flat, found, dim=0) > 0.98
    assert float(found.norm()) == pytest.approx(float(flat.norm()), rel=0.05)
    # What is never drawn is neither learnt nor unlearnt.
    names = dict(zip([name for name, _ in model.named_parameters()], moved, strict=True))
    torch.testing.assert_close(names["output.bias"][[PAD, START, UNK]], torch.zeros(3))


@pytest.mark.parametrize("kind", sorted(DECODERS))
def test_a_word_is_dropped_out_alike_under_teacher_forcing_and_step_by_step(kind: str) -> None:
    model = decoder(kind, dropout=0.5).train()
    calls: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    model(features(2), torch.tensor([[START], [START]]))
    whole, calls[:] = sorted(calls), []
    model.step(torch.tensor([START, START]), model.start(features(2)))
    assert sorted(calls) == whole


def test_dropout_is_on_while_captions_are_drawn() -> None:
    drawing = Drawing(decoder("merge", dropout=0.5), SelfCriticalConfig(samples=2, max_length=6))
    torch.manual_seed(1)
    dropped = drawing.train()(features(3))[1]
    torch.manual_seed(1)
    whole = drawing.eval()(features(3))[1]
    assert not torch.equal(dropped[..., 0], whole[..., 0])


def test_members_of_an_ensemble_draw_captions_of_their_own() -> None:
    alone = decoder("merge")
    other = build_decoder(DecoderConfig(width=16, output_width=16), WORDS, CHANNELS).eval()
    settings = SelfCriticalConfig(samples=5, max_length=6)
    torch.manual_seed(1)
    tokens, log_probs = Drawing(Ensemble([alone, other]), settings).eval()(features(3))
    assert tokens.shape[:2] == (2, 15)
    assert log_probs.shape == (2, 15, tokens.shape[2] - 1)
    torch.manual_seed(1)
    first, _ = Drawing(alone, settings).eval()(features(3))
    torch.testing.assert_close(tokens[0, :, : first.shape[2]], first[0])
    assert not torch.equal(tokens[0], tokens[1])


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_members_learn_from_their_own_rewards_against_their_own_baseline(compute: str) -> None:
    way = way_of([[START, 4 + image, 6, END] for image in range(3)], [0, 1, 2])
    critic = Critic(way.data, SelfCriticalConfig(samples=2, max_length=6))
    (batch,) = way.batches(way.plan(0, images=3), 0)
    drawing = Drawing(Ensemble([decoder("merge"), decoder("transformer")]), critic.settings)
    torch.manual_seed(3)
    with autocast(torch.device("cpu"), compute):
        drawn, log_probs = drawing(batch.features)
    wanted, total = torch.zeros(()), 0.0
    for member in range(2):
        for row, image in enumerate(critic.images(batch)):
            pair = [2 * row, 2 * row + 1]
            rewards = [
                critic.reward(image, [word for word in drawn[member, one, 1:].tolist() if word])
                for one in pair
            ]
            total += sum(rewards)
            # Of two captions the baseline of each is the other's reward.
            for one, own, other in zip(pair, rewards, reversed(rewards), strict=True):
                wanted = wanted - (own - other) * log_probs[member, one].sum() / 2
    expected = torch.autograd.grad(wanted * (4 / batch.global_targets), drawing.parameters())
    before = [weight.detach().clone() for weight in drawing.parameters()]
    torch.manual_seed(3)
    optimizer = torch.optim.SGD(drawing.parameters(), 1.0)
    reward, captions, loss = take_step(
        drawing, batch, critic, optimizer, workers=4, compute=compute
    )
    assert (reward, captions) == (pytest.approx(total), 12)
    assert total > 0
    assert loss == pytest.approx(float(wanted.detach()), rel=1e-4)
    for old, new, gradient in zip(before, drawing.parameters(), expected, strict=True):
        torch.testing.assert_close(old - new.detach(), gradient, rtol=1e-3, atol=1e-5)


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
    drawing = Drawing(model.decoder, critic.settings).train()
    optimizer = torch.optim.AdamW(drawing.parameters(), 0.002)
    rewards = []
    for _ in range(60):
        for batch in way.batches(way.plan(0, images=3), 0):
            total, count, _ = self_critical_step(
                drawing,
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
    idle = way_of([[START, 4, END], [START, 5, END]], [0, 1], rank=2, workers=3)
    critic = Critic(idle.data, SelfCriticalConfig(samples=2))
    model = Drawing(decoder("merge"), critic.settings).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    (batch,) = idle.batches(idle.plan(0, images=2), 0)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    assert take_step(model, batch, critic, optimizer, workers=3) == (0.0, 0.0, 0.0)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_broken_decoder_shows_in_the_loss_though_its_captions_earn_nothing() -> None:
    way = way_of([[START, 4, END], [START, 5, END]], [0, 1])
    critic = Critic(way.data, SelfCriticalConfig(samples=2))
    model = Drawing(decoder("merge"), critic.settings).train()
    nn.init.constant_(model.decoder.output.bias, torch.nan)
    (batch,) = way.batches(way.plan(0, images=2), 0)
    reward, _, loss = take_step(model, batch, critic, torch.optim.SGD(model.parameters(), 1.0))
    assert reward == 0.0
    assert math.isnan(loss)
