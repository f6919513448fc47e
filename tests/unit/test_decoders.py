"""What every decoder promises, and the merge decoder's equivalence to the notebook's training rows."""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from captioner import decoders
from captioner.artifacts.model_directory import pack_weights, unpack_weights
from captioner.decoders import decoder_class
from captioner.decoders.base import Decoder, Standardize
from captioner.errors import ConfigError, ModelError
from captioner.text import PAD
from captioner.training.steps import OptimizerConfig, TeacherForcing, autocast, build_optimizer
from tests.decoders import (
    ATTENDING,
    KINDS,
    SHAPE,
    VOCABULARY,
    captions,
    features,
    small_decoder,
)

EVERY = [*KINDS, "adaptive_attention picture", "transformer picture"]


def build(kind: str, width: int = 16) -> nn.Module:
    """A decoder of two layers, with picture blocks where its name says so."""
    name, *picture = kind.split()
    return small_decoder(name, width=width, layers=2, picture_layers=2 * len(picture))


@pytest.fixture(params=EVERY)
def decoder(request: pytest.FixtureRequest) -> nn.Module:
    return build(request.param)


def test_whole_caption_loss_equals_the_notebooks_prefix_rows(decoder: nn.Module) -> None:
    image, tokens = features(1), captions(7)
    whole, _ = TeacherForcing(decoder)(image, tokens)
    rows = torch.tensor(0.0)
    for end in range(1, tokens.shape[1]):
        # One row of the notebook: the prefix alone, nothing after it, and the next word as the target.
        logits = decoder(image, tokens[:, :end])[:, -1]
        rows = rows + nn.functional.cross_entropy(logits, tokens[:, end], reduction="sum")
    torch.testing.assert_close(whole, rows, rtol=1e-5, atol=1e-4)


def test_steps_give_the_logits_of_the_whole_caption(decoder: nn.Module) -> None:
    image, tokens = features(3), captions(5, 5, 5)
    expected = decoder(image, tokens)
    state = decoder.start(image)
    for position in range(tokens.shape[1]):
        logits, state, attention = decoder.step(tokens[:, position], state)
        torch.testing.assert_close(logits, expected[:, position], rtol=1e-4, atol=1e-5)
        assert (attention is not None) == decoder.attends
        if attention is not None:
            assert attention.shape == (3, SHAPE.cells)
            torch.testing.assert_close(attention.sum(dim=1), torch.ones(3))


def test_captions_of_one_image_share_what_describes_it(decoder: nn.Module) -> None:
    image, tokens = features(2), captions(5, 5, 5, 5, 5, 5)
    repeated = {name: column.repeat_interleave(3, dim=0) for name, column in image.items()}
    expected = decoder(repeated, tokens)
    start = decoder.start(image)
    shared = {name: start[name] for name in decoder.image_state}
    state = {
        name: tensor if name in shared else tensor.repeat_interleave(3, dim=0)
        for name, tensor in start.items()
    }
    for position in range(tokens.shape[1]):
        logits, state, attention = decoder.step(tokens[:, position], state)
        torch.testing.assert_close(logits, expected[:, position], rtol=1e-4, atol=1e-5)
        assert attention is None or attention.shape == (6, SHAPE.cells)
        assert all(len(tensor) == 2 and state[name] is tensor for name, tensor in shared.items())


def test_later_words_do_not_change_earlier_logits(decoder: nn.Module) -> None:
    image, tokens = features(2), captions(6, 6)
    changed = tokens.clone()
    changed[:, 4:] = (changed[:, 4:] + 1) % VOCABULARY
    torch.testing.assert_close(decoder(image, tokens)[:, :4], decoder(image, changed)[:, :4])
    assert not torch.allclose(decoder(image, tokens)[:, 4:], decoder(image, changed)[:, 4:])


def test_padding_changes_no_loss(decoder: nn.Module) -> None:
    image, tokens = features(2), captions(3, 8)
    together, _ = TeacherForcing(decoder)(image, tokens)
    alone = sum(
        TeacherForcing(decoder)(
            {name: column[row : row + 1] for name, column in image.items()}, part
        )[0]
        for row, part in ((0, tokens[:1, :5]), (1, tokens[1:]))
    )
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("images", [0, 2])
def test_every_parameter_gets_a_gradient(decoder: nn.Module, images: int) -> None:
    # DDP waits for all of them, also on a worker that has no caption of the last batch.
    loss, _ = TeacherForcing(decoder.train())(features(images), captions(3, 8)[:images])
    loss.backward()
    assert [name for name, one in decoder.named_parameters() if one.grad is None] == []


@pytest.mark.parametrize("kind", ATTENDING)
def test_tied_embeddings_are_one_matrix_and_stay_tied_when_loaded(kind: str) -> None:
    apart, tied, other = (
        small_decoder(kind, tie_embeddings=tie, seed=seed)
        for seed, tie in enumerate((False, True, True))
    )
    counts = [sum(one.numel() for one in decoder.parameters()) for decoder in (apart, tied)]
    assert counts[0] - counts[1] == VOCABULARY * 16
    unpack_weights(other, pack_weights(tied))
    assert other.output.weight is other.embedding.weight
    torch.testing.assert_close(
        other(features(2), captions(4, 4)), tied(features(2), captions(4, 4))
    )


@pytest.mark.parametrize("kind", ATTENDING)
def test_the_place_of_a_cell_matters_to_the_transformer_alone(kind: str) -> None:
    decoder = small_decoder(kind)
    image, tokens = features(1), captions(4)
    flipped = {"grid": image["grid"].flip(1)}
    same = torch.allclose(decoder(image, tokens), decoder(flipped, tokens), rtol=1e-4, atol=1e-5)
    assert same == (kind != "transformer")


def test_eight_captions_can_be_learned_by_heart(decoder: nn.Module) -> None:
    torch.manual_seed(0)
    for module in decoder.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model = TeacherForcing(decoder.train())
    optimizer = build_optimizer(OptimizerConfig(learning_rate=0.02), decoder)
    image, tokens = features(8), captions(5, 6, 7, 8, 5, 6, 7, 8)
    words = int((tokens[:, 1:] != PAD).sum())
    for _ in range(200):
        loss, correct = model(image, tokens)
        optimizer.zero_grad()
        (loss / words).backward()
        optimizer.step()
    assert int(correct) / words > 0.95


@pytest.mark.parametrize("kind", EVERY)
def test_weights_survive_packing_and_misfits_are_named(kind: str) -> None:
    decoder = build(kind)
    image, tokens = features(2), captions(4, 4)
    expected = decoder(image, tokens)
    packed = pack_weights(decoder)
    for parameter in decoder.parameters():
        nn.init.zeros_(parameter)
    unpack_weights(decoder, packed)
    torch.testing.assert_close(decoder(image, tokens), expected)
    wider = build(kind, width=32)
    shapes = wider.state_dict()
    first = min(
        name for name, one in decoder.state_dict().items() if one.shape != shapes[name].shape
    )
    with pytest.raises(ModelError, match=f"does not fit its configuration: {re.escape(first)} is "):
        unpack_weights(wider, packed)


def test_merge_computes_what_the_notebooks_layers_compute() -> None:
    decoder = small_decoder("merge")
    weights = decoder.state_dict()
    lstm = nn.LSTM(16, 16, batch_first=True)
    lstm.load_state_dict({name: weights[f"lstm.{name}"] for name, _ in lstm.named_parameters()})

    def dense(name: str, inputs: Tensor) -> Tensor:
        return nn.functional.linear(inputs, weights[f"{name}.weight"], weights[f"{name}.bias"])

    pooled, tokens = features(2)["pooled"], captions(4, 6)
    image = dense("image", pooled).relu().unsqueeze(1)
    outputs, _ = lstm(torch.cat([image, weights["embedding.weight"][tokens]], dim=1))
    expected = dense("output", dense("dense", outputs[:, 1:] + image).relu())
    torch.testing.assert_close(decoder({"pooled": pooled}, tokens), expected)


def test_one_factor_for_all_channels_keeps_their_proportions() -> None:
    seen = features(64)["pooled"] * torch.logspace(-2, 2, SHAPE.pooled_channels) + 1
    standardize = Standardize("pooled", SHAPE)
    standardize.fit(seen.mean(dim=0), seen.std(dim=0, correction=0), whole=True)
    torch.testing.assert_close(standardize({"pooled": seen}), seen / seen.std(correction=0))


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_gives_nearly_the_gradients_of_float32(kind: str) -> None:
    decoder = small_decoder(kind, width=32, dropout=0.0, feature_dropout=0.0)
    image, tokens = features(32), captions(*[5, 8, 6, 7] * 8)
    gradients = []
    for compute in ("float32", "bfloat16"):
        decoder.zero_grad()
        with autocast(torch.device("cpu"), compute):
            loss, _ = TeacherForcing(decoder).train()(image, tokens)
        loss.backward()
        gradients.append(torch.cat([one.grad.flatten() for one in decoder.parameters()]))
    assert torch.cosine_similarity(*gradients, dim=0) > 0.999
    assert float(gradients[1].norm() / gradients[0].norm()) == pytest.approx(1, abs=0.02)


def test_every_kind_is_a_module_with_its_class() -> None:
    folder = Path(decoders.__file__).parent
    there = [
        kind
        for kind in (file.stem for file in sorted(folder.glob("*.py")))
        if f"class {kind.title().replace('_', '')}Decoder(" in (folder / f"{kind}.py").read_text()
    ]
    assert there == KINDS
    for kind in KINDS:
        found = decoder_class(kind)
        assert issubclass(found, Decoder)
        # Of the class: what a decoder reads and gives is known before there is one.
        assert set(found.columns) <= {"pooled", "grid"}
        assert isinstance(found.attends, bool)


@pytest.mark.parametrize("kind", ["adaptive_attention", "transformer"])
def test_heads_that_do_not_divide_the_width_are_refused(kind: str) -> None:
    with pytest.raises(ConfigError, match=r"decoder\.heads: 8 must divide width 20"):
        small_decoder(kind, width=20, heads=8)
