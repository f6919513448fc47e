"""The fused output layer and loss against torch's own, and the quick dropout."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from captioner.decoders.dropout import Dropout
from captioner.training import loss as module
from captioner.training.loss import IGNORED, linear_cross_entropy

WORDS, WIDTH, VOCABULARY = 37, 6, 23


def problem(dtype: torch.dtype = torch.float32) -> tuple[Tensor, nn.Linear, Tensor]:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    hidden = (3 * torch.randn(WORDS, WIDTH, generator=generator)).to(dtype).requires_grad_()
    targets = torch.randint(VOCABULARY, (WORDS,), generator=generator)
    targets[::5] = IGNORED
    return hidden, nn.Linear(WIDTH, VOCABULARY).to(dtype), targets


@pytest.mark.parametrize("chunk", [1, 5 * VOCABULARY, 2**22])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_and_gradients_are_those_of_torch(
    monkeypatch: pytest.MonkeyPatch, chunk: int, smoothing: float
) -> None:
    monkeypatch.setattr(module, "_CHUNK", chunk)
    hidden, output, targets = problem(torch.float64)
    logits = output(hidden)
    expected = functional.cross_entropy(
        logits, targets, reduction="sum", label_smoothing=smoothing, ignore_index=IGNORED
    )
    wanted = torch.autograd.grad(2.5 * expected, [hidden, output.weight, output.bias])
    found, correct = linear_cross_entropy(
        hidden,
        output.weight,
        output.bias,
        targets,
        label_smoothing=smoothing,
    )
    gradients = torch.autograd.grad(2.5 * found, [hidden, output.weight, output.bias])
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    for one, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert int(correct) == int((logits.argmax(dim=-1) == targets).sum())


def test_bfloat16_stays_near_float32() -> None:
    hidden, output, targets = problem()
    exact, _ = linear_cross_entropy(hidden, output.weight, output.bias, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        near, _ = linear_cross_entropy(hidden, output.weight, output.bias, targets)
    near.backward()
    assert near.item() == pytest.approx(exact.item(), rel=0.02)
    assert output.weight.grad is not None
    assert output.weight.grad.dtype == torch.float32


def test_no_words_give_no_loss_and_no_gradient() -> None:
    hidden, output, targets = problem()
    loss, correct = linear_cross_entropy(hidden[:0], output.weight, output.bias, targets[:0])
    loss.backward()
    assert (loss.item(), int(correct)) == (0.0, 0)
    assert output.weight.grad is not None
    assert not output.weight.grad.any()


@pytest.mark.parametrize("probability", [0.1, 0.5])
def test_dropout_keeps_the_mean_and_drops_the_share_asked_for(probability: float) -> None:
    torch.manual_seed(0)
    dropout = Dropout(probability)
    values = torch.ones(1001, 301, requires_grad=True)
    dropped = dropout(values)
    share = float((dropped == 0).float().mean())
    assert share == pytest.approx(probability, abs=0.005)
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.01)
    dropped.sum().backward()
    assert torch.equal(values.grad, dropped.detach())


def test_dropout_is_seeded_and_for_training_alone() -> None:
    values, dropout = torch.randn(50, 7), Dropout(0.3)
    assert torch.equal(dropout.eval()(values), values)
    dropout.train()
    torch.manual_seed(3)
    first = dropout(values)
    torch.manual_seed(3)
    assert torch.equal(dropout(values), first)
    assert not torch.equal(dropout(values), first)
