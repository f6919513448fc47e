"""What every decoder promises, and the merge decoder's equivalence to the notebook's training rows."""

import pytest
import torch
from torch import Tensor, nn

from captioner.config import DecoderConfig
from captioner.errors import ModelError
from captioner.model_store import pack_weights, unpack_weights
from captioner.models import DECODERS, build_decoder
from captioner.models.base import Features
from captioner.text import END, PAD, START
from captioner.training.steps import OptimizerConfig, TeacherForcing, build_optimizer

VOCABULARY, CHANNELS, CELLS = 23, 12, 49


@pytest.fixture(params=sorted(DECODERS))
def decoder(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    config = DecoderConfig(
        kind=request.param, width=16, output_width=12, attention_width=8, heads=4, layers=2
    )
    return build_decoder(config, VOCABULARY, CHANNELS).eval()


def features(images: int) -> Features:
    generator = torch.Generator().manual_seed(1)
    return {
        "pooled": torch.randn(images, CHANNELS, generator=generator),
        "grid": torch.randn(images, CELLS, CHANNELS, generator=generator),
    }


def captions(*lengths: int) -> Tensor:
    """Random captions of these numbers of words, padded together."""
    generator = torch.Generator().manual_seed(2)
    rows = [
        torch.cat(
            [
                torch.tensor([START]),
                torch.randint(4, VOCABULARY, (length,), generator=generator),
                torch.tensor([END]),
            ]
        )
        for length in lengths
    ]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)


def test_whole_caption_loss_equals_the_seeds_prefix_rows(decoder: nn.Module) -> None:
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
        if attention is not None:
            assert attention.shape == (3, CELLS)
            torch.testing.assert_close(attention.sum(dim=1), torch.ones(3))


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


def test_every_parameter_gets_a_gradient(decoder: nn.Module) -> None:
    loss, _ = TeacherForcing(decoder.train())(features(2), captions(3, 8))
    loss.backward()
    assert [name for name, one in decoder.named_parameters() if one.grad is None] == []


def test_eight_captions_can_be_learned_by_heart(decoder: nn.Module) -> None:
    torch.manual_seed(0)
    for module in decoder.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model = TeacherForcing(decoder.train())
    optimizer = build_optimizer(OptimizerConfig(learning_rate=0.02), decoder)
    image, tokens = features(8), captions(5, 6, 7, 8, 5, 6, 7, 8)
    words = int((tokens[:, 1:] != PAD).sum())
    for _ in range(150):
        loss, correct = model(image, tokens)
        optimizer.zero_grad()
        (loss / words).backward()
        optimizer.step()
    assert int(correct) / words > 0.95


def test_weights_survive_packing_and_misfits_are_named(decoder: nn.Module) -> None:
    image, tokens = features(2), captions(4, 4)
    expected = decoder(image, tokens)
    packed = pack_weights(decoder)
    for parameter in decoder.parameters():
        nn.init.zeros_(parameter)
    unpack_weights(decoder, packed)
    torch.testing.assert_close(decoder(image, tokens), expected)
    kind = next(name for name, one in DECODERS.items() if type(decoder) is one)
    config = DecoderConfig(
        kind=kind, width=32, output_width=12, attention_width=8, heads=4, layers=2
    )
    with pytest.raises(ModelError, match="does not fit its configuration: "):
        unpack_weights(build_decoder(config, VOCABULARY, CHANNELS), packed)


def test_merge_has_the_seeds_layers() -> None:
    decoder = build_decoder(DecoderConfig(kind="merge", width=256, output_width=128), 7368, 2048)
    counted = sum(parameter.numel() for parameter in decoder.parameters())
    image, words = 2048 * 256 + 256, 7368 * 256
    lstm = 4 * (256 * 256 + 256 * 256 + 2 * 256)  # torch keeps two biases where Keras has one
    assert counted == image + words + lstm + (256 * 128 + 128) + (128 * 7368 + 7368)
