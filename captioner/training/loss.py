"""The output layer and its cross-entropy as one operation, a few rows at a time.

Logits of a whole batch are by far the largest tensor of training (720 words x 7,369 x 4 bytes for 64 captions), and
every pass over them costs memory bandwidth. Here they turn into their own gradients in place and at once, as in Hsu et
al., "Liger Kernel: Efficient Triton Kernels for LLM Training" (2024).

Shapes: W words, O output width, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

IGNORED = -100

# Elements of a chunk of logits: 16 MiB of float32. Smaller ones would suit the cache better, but every chunk also adds
# to the gradient of the whole output layer.
_CHUNK = 2**22


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    targets: Tensor,
    *,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy of ``hidden @ weight.T + bias``, and the number of targets that were the most probable.

    Args:
        hidden: float [W, O]; under autocasting the products are bfloat16 and the softmax float32.
        weight: float [V, O].
        bias: float [V].
        targets: int64 [W]; rows of ``IGNORED`` count for nothing.
        label_smoothing: probability spread evenly over the vocabulary, as ``functional.cross_entropy`` does.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), bias.to(dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        loss: Tensor
        correct: Tensor
        loss, correct = _LinearCrossEntropy.apply(hidden, weight, bias, targets, label_smoothing)
    return loss, correct


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor,
        targets: Tensor,
        smoothing: float,
    ) -> tuple[Tensor, Tensor]:
        needed = any(ctx.needs_input_grad)
        grad_hidden = torch.empty_like(hidden) if needed else None
        # Sums over the chunks, in float32 whatever the arithmetic.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needed else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if needed else None
        loss = hidden.new_zeros((), dtype=torch.float32)
        correct = hidden.new_zeros((), dtype=torch.int64)
        rows = max(1, _CHUNK // len(weight))
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            counted = targets[part] != IGNORED
            wanted = targets[part].clamp(min=0).unsqueeze(1)
            logits = functional.linear(hidden[part], weight, bias).float()
            # Softmax by hand, in place: torch's own log_softmax and its gradient take several times as long on a CPU.
            highest = logits.amax(dim=-1)
            of_target = logits.gather(1, wanted).squeeze(1)
            # A target is the most probable word if nothing exceeds it; quicker than an argmax.
            correct += ((of_target >= highest) & counted).sum()
            mean = logits.mean(dim=-1) if smoothing else 0.0
            exponentials = logits.sub_(highest.unsqueeze(1)).exp_()
            total = exponentials.sum(dim=-1)
            losses = highest + total.log() - (1 - smoothing) * of_target - smoothing * mean
            loss += losses.masked_fill(~counted, 0.0).sum()
            if grad_hidden is None or grad_weight is None or grad_bias is None:
                continue
            # d loss / d logits = softmax - targets, the smoothed ones.
            grad = exponentials.mul_((counted / total).unsqueeze(1))
            if smoothing:
                grad -= (counted * (smoothing / len(weight))).unsqueeze(1)
            grad.scatter_add_(1, wanted, (counted * (smoothing - 1)).unsqueeze(1))
            grad_bias += grad.sum(dim=0)
            grad = grad.to(hidden.dtype)
            torch.mm(grad, weight, out=grad_hidden[part])
            grad_weight += grad.mT @ hidden[part]
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (weight.dtype, bias.dtype)
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        return (
            grad_hidden * grad_loss.to(grad_hidden.dtype),
            (grad_weight * grad_loss).to(weight_dtype),
            (grad_bias * grad_loss).to(bias_dtype),
            None,
            None,
        )
