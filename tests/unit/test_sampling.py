"""Captions sampled from a decoder."""

import pytest
import torch
from torch import nn

from captioner.decoding.sampling import sample
from captioner.text import END, PAD, START, UNK
from tests.decoders import KINDS, features, small_decoder


@pytest.mark.parametrize("kind", KINDS)
def test_samples_follow_the_decoders_own_distribution(kind: str) -> None:
    model = small_decoder(kind, vocabulary=12)
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
        shares = torch.bincount(first, minlength=12) / 4000
        torch.testing.assert_close(shares, expected[image], atol=0.03, rtol=0)
    # The log-probabilities are those of the whole captions under teacher forcing.
    every = model(features(2), drawn[:, :-1])
    every[:, :, [PAD, START, UNK]] = -torch.inf
    wanted = torch.log_softmax(every, dim=-1).gather(2, drawn[:, 1:, None]).squeeze(2)
    real = drawn[:, 1:] != PAD
    torch.testing.assert_close(log_probs[real], wanted[real], rtol=1e-4, atol=1e-5)
    assert not log_probs[~real].any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_word_is_dropped_out_alike_under_teacher_forcing_and_step_by_step(kind: str) -> None:
    model = small_decoder(kind, picture_layers=1, dropout=0.5, feature_dropout=0.5).train()
    calls: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    model(features(2), torch.tensor([[START], [START]]))
    whole, calls[:] = sorted(calls), []
    model.step(torch.tensor([START, START]), model.start(features(2)))
    assert sorted(calls) == whole
