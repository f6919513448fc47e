"""An ensemble is a decoder like its members, and its words have the mean of their probabilities."""

import pytest
import torch
from torch import nn

from captioner.artifacts.model_directory import pack_weights, unpack_weights
from captioner.config import DecodeConfig
from captioner.decoders.ensemble import Ensemble
from captioner.decoding.beam import search
from captioner.errors import ModelError
from captioner.training.steps import TeacherForcing
from tests.decoders import KINDS, SHAPE, VOCABULARY, captions, features, small_decoder


def member(kind: str, seed: int = 0, vocabulary: int = VOCABULARY) -> nn.Module:
    decoder = small_decoder(
        kind, seed=seed, vocabulary=vocabulary, layers=2, dropout=0.0, feature_dropout=0.0
    )
    with torch.no_grad():
        # Sharper than fresh weights, so that the mean of probabilities is far from that of logits.
        decoder.output.weight.mul_(5)
    return decoder


@pytest.fixture
def ensemble() -> Ensemble:
    return Ensemble([member(kind) for kind in KINDS]).eval()


def test_a_word_has_the_mean_of_the_members_probabilities(ensemble: Ensemble) -> None:
    image, tokens = features(2), captions(5, 5)
    members = torch.stack([torch.softmax(one(image, tokens), dim=-1) for one in ensemble.members])
    torch.testing.assert_close(ensemble(image, tokens).exp(), members.mean(dim=0))


def test_steps_give_the_log_probabilities_of_the_whole_caption(ensemble: Ensemble) -> None:
    image, tokens = features(3), captions(5, 5, 5)
    expected = ensemble(image, tokens)
    state = ensemble.start(image)
    for position in range(tokens.shape[1]):
        logits, state, attention = ensemble.step(tokens[:, position], state)
        torch.testing.assert_close(logits, expected[:, position], rtol=1e-4, atol=1e-4)
        assert attention is not None
        assert attention.shape == (3, SHAPE.cells)
        torch.testing.assert_close(attention.sum(dim=1), torch.ones(3))


def test_an_ensemble_of_one_decoder_twice_captions_as_that_decoder(ensemble: Ensemble) -> None:
    decode = DecodeConfig(beam_size=4, num_captions=2, max_length=10)
    for decoder in ensemble.members:
        image = {name: features(4)[name] for name in decoder.columns}
        expected = search(decoder, image, decode)
        for one, two in zip(
            expected, search(Ensemble([decoder, decoder]), image, decode), strict=True
        ):
            assert [caption.tokens for caption in one] == [caption.tokens for caption in two]


def test_its_teacher_forced_loss_is_that_of_its_probabilities(ensemble: Ensemble) -> None:
    image, tokens = features(2), captions(3, 8)
    loss, _ = TeacherForcing(ensemble).eval()(image, tokens)
    expected = nn.functional.nll_loss(
        ensemble(image, tokens[:, :-1]).flatten(0, 1),
        tokens[:, 1:].flatten(),
        ignore_index=0,
        reduction="sum",
    )
    torch.testing.assert_close(loss, expected)


def test_in_training_each_member_has_its_own_loss() -> None:
    members = [member("merge", seed=seed) for seed in range(3)]
    image, tokens = {"pooled": features(2)["pooled"]}, captions(3, 8)
    alone, right, gradients = [], [], []
    for one in members:
        loss, correct = TeacherForcing(one, label_smoothing=0.1).train()(image, tokens)
        right.append(float(correct))
        gradients.append(torch.autograd.grad(loss, one.output.weight)[0])
        alone.append(loss.detach())
    loss, correct = TeacherForcing(Ensemble(members), label_smoothing=0.1).train()(image, tokens)
    torch.testing.assert_close(loss.detach(), torch.stack(alone).mean())
    assert float(correct) == pytest.approx(sum(right) / 3)
    loss.backward()
    for one, expected in zip(members, gradients, strict=True):
        torch.testing.assert_close(one.output.weight.grad, expected / 3)


@pytest.mark.parametrize("images", [0, 2])
def test_every_member_gets_gradients(ensemble: Ensemble, images: int) -> None:
    # DDP waits for all of them, also on a worker that has no caption of the last batch.
    loss, _ = TeacherForcing(ensemble).train()(features(images), captions(3, 8)[:images])
    loss.backward()
    assert [name for name, one in ensemble.named_parameters() if one.grad is None] == []


def test_members_are_built_with_weights_of_their_own() -> None:
    built, again = (small_decoder(ensemble_size=3, seed=seed) for seed in range(2))
    assert isinstance(built, Ensemble)
    weights = [one.output.weight for one in built.members]
    assert len(weights) == 3
    assert not torch.equal(weights[0], weights[1])
    unpack_weights(again, pack_weights(built))
    image, tokens = {"pooled": features(2)["pooled"]}, captions(3, 8)
    torch.testing.assert_close(again(image, tokens), built(image, tokens))


def test_members_of_different_vocabularies_are_refused() -> None:
    with pytest.raises(ModelError, match=r"sizes: \[23, 24\]"):
        Ensemble([member("merge"), member("merge", vocabulary=24)])
    with pytest.raises(ModelError, match=r"sizes: \[\]"):
        Ensemble([])
