"""The cross-entropy in pieces is that of torch, and the quick dropout is a dropout."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from captioner.decoders.dropout import Dropout
from captioner.training.loss import IGNORED, cross_entropy

WIDTH, VOCABULARY = 6, 23


def problem(targets: int) -> tuple[Tensor, nn.Linear, Tensor]:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    hidden = (3 * torch.randn(targets, WIDTH, generator=generator)).requires_grad_()
    wanted = torch.randint(VOCABULARY, (targets,), generator=generator)
    wanted[::5] = IGNORED
    return hidden, nn.Linear(WIDTH, VOCABULARY), wanted


@pytest.mark.parametrize("targets", [1, 37, 700])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_and_gradients_are_those_of_torch(targets: int, smoothing: float) -> None:
    hidden, output, wanted = problem(targets)
    logits = output(hidden)
    expected = functional.cross_entropy(
        logits, wanted, reduction="sum", label_smoothing=smoothing, ignore_index=IGNORED
    )
    weights = [hidden, output.weight, output.bias]
    gradients = torch.autograd.grad(2.5 * expected, weights)
    loss, correct = cross_entropy(output, hidden, wanted, label_smoothing=smoothing)
    torch.testing.assert_close(loss, expected)
    found = torch.autograd.grad(2.5 * loss, weights)
    torch.testing.assert_close(found, gradients, rtol=1e-4, atol=1e-4)
    assert int(correct) == int((logits.argmax(dim=-1) == wanted).sum())


def test_bfloat16_stays_near_float32() -> None:
    hidden, output, wanted = problem(37)
    exact, _ = cross_entropy(output, hidden, wanted)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        near, _ = cross_entropy(output, hidden, wanted)
    near.backward()
    assert near.dtype == torch.float32
    assert near.item() == pytest.approx(exact.item(), rel=0.02)
    assert output.weight.grad is not None
    assert output.weight.grad.dtype == torch.float32


def test_no_targets_give_no_loss_and_no_gradient() -> None:
    hidden, output, wanted = problem(37)
    loss, correct = cross_entropy(output, hidden[:0], wanted[:0])
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
