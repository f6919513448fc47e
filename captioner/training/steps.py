"""The arithmetic of training, on tensors alone: loss, optimizer, schedule.

Shapes: B captions, T tokens, O output width, V vocabulary, W target tokens, padding left out.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, TypedDict, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from captioner.config import LearningConfig, OptimizerConfig
from captioner.decoders.base import Decoder, Features, packs
from captioner.decoders.ensemble import members_of
from captioner.errors import ConfigError, TrainingError
from captioner.runtime.device import has_avx512
from captioner.text import PAD
from captioner.training.data import Batch
from captioner.training.loss import IGNORED, cross_entropy
from captioner.training.plan import Indices

_ROUND = 64


class TeacherForcing(nn.Module):
    """A decoder with its loss: what DDP wraps, so that a pass over whole captions is one ``forward``."""

    def __init__(self, decoder: Decoder, label_smoothing: float = 0.0):
        super().__init__()
        self.decoder = decoder
        self.label_smoothing = label_smoothing

    def forward(
        self, features: Features, tokens: Tensor, images: Indices | None = None
    ) -> tuple[Tensor, Tensor]:
        """Sums over all target tokens of the captions ``tokens`` int64 [B, T].

        Args:
            features: columns of N images, each with B / N captions that follow each other.
            images: not read.

        Returns:
            summed cross-entropy (smoothed while training), and the number of target tokens that were the most probable,
            both float32. Of an ensemble in training they are means over its members, otherwise those of its mean
            probabilities.
        """
        # Each member by its own loss: a common one would let them lean on each other.
        decoders = members_of(self.decoder) if self.training else [self.decoder]
        found = [self._sums(decoder, features, tokens) for decoder in decoders]
        losses, correct = zip(*found, strict=True)
        return torch.stack(losses).mean(), torch.stack(correct).float().mean()

    def _sums(self, decoder: Decoder, features: Features, tokens: Tensor) -> tuple[Tensor, Tensor]:
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        hidden = decoder.hidden(features, inputs).flatten(0, 1)
        if packs(tokens.device):
            hidden, wanted = without_padding(hidden, targets.flatten())
        else:
            wanted = torch.where(targets == PAD, IGNORED, targets).flatten()
        smoothing = self.label_smoothing if self.training else 0.0
        return cross_entropy(decoder.output, hidden, wanted, label_smoothing=smoothing)


def without_padding(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The rows [W, O] of ``hidden`` that count, and their words: padding does not meet the vocabulary, for that
    projection is most of the work."""
    places = (targets != PAD).nonzero().squeeze(1)
    wanted = targets[places]
    # Rounded up with words that count for nothing: oneDNN keeps buffers for every shape it has met.
    excess = -len(places) % _ROUND
    places = functional.pad(places, (0, excess))
    return hidden.index_select(0, places), functional.pad(wanted, (0, excess), value=IGNORED)


@torch.inference_mode()
def teacher_forcing(
    decoder: Decoder,
    features: Features,
    rows: Tensor,
    captions: Sequence[Sequence[int]],
) -> tuple[float, int, int]:
    """Teacher-forced sums over captions of a batch of images.

    Args:
        features: columns of N images, float32.
        rows: int64 [B], each caption's image.
        captions: token ids of B captions, ``<start>`` first, ``<end>`` last.

    Returns:
        summed cross-entropy in nats, target tokens that were the most probable, target tokens.
    """
    if not captions:
        return 0.0, 0, 0
    tokens = nn.utils.rnn.pad_sequence(
        [torch.tensor(caption) for caption in captions], batch_first=True, padding_value=PAD
    )
    device = next(iter(features.values())).device
    picked = {name: column[rows.to(device)] for name, column in features.items()}
    loss, correct = TeacherForcing(decoder).eval()(picked, tokens.to(device))
    return float(loss), int(correct), sum(len(caption) - 1 for caption in captions)


class ParameterGroup(TypedDict):
    """Parameters that learn at a pace of their own."""

    params: list[nn.Parameter]
    pace: float
    """Their learning rate, in parts of the schedule's."""
    weight_decay: float


def build_optimizer(
    config: OptimizerConfig, network: nn.Module, groups: Sequence[ParameterGroup] | None = None
) -> torch.optim.Optimizer:
    """The optimizer of ``config`` over all parameters of a decoder, or over some of a network."""
    rate, decay = config.learning_rate, config.weight_decay
    if config.name != "adamw" and isinstance(network, Decoder):
        # L2 decay is part of the gradient, which for each member of an ensemble is that of the mean of their losses.
        decay /= len(members_of(network))
    parameters: Any = network.parameters() if groups is None else groups
    if config.name == "rmsprop":
        # Keras' decay of the squared gradients, 0.9; torch's own default is 0.99.
        return torch.optim.RMSprop(parameters, rate, alpha=0.9, weight_decay=decay)
    kind = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
    return kind(parameters, rate, weight_decay=decay, fused=True)


class Schedule:
    """Learning rate by step and, for ``plateau``, by what validation says. Its state is two numbers."""

    def __init__(self, config: OptimizerConfig, total_steps: int):
        self.config = config
        self.total_steps = total_steps
        self.factor = 1.0
        self.waited = 0

    def rate(self, step: float) -> float:
        """Learning rate of a step, counted from 0; between two where workers' steps are not those of one."""
        config = self.config
        if step < config.warmup_steps:
            return config.learning_rate * min(1.0, (step + 1) / config.warmup_steps)
        if config.schedule == "cosine":
            done = (step - config.warmup_steps) / max(1, self.total_steps - config.warmup_steps)
            return config.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        return max(config.minimum, config.learning_rate * self.factor)

    def after_epoch(self, improved: bool) -> None:
        """Keras' ReduceLROnPlateau: after ``plateau_patience`` epochs without improvement, multiply."""
        self.waited = 0 if improved else self.waited + 1
        if self.config.schedule == "plateau" and self.waited >= max(
            1, self.config.plateau_patience
        ):
            self.factor *= self.config.plateau_factor
            self.waited = 0


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    *,
    seed: tuple[int, ...],
    workers: int,
    config: LearningConfig,
    compute: str,
) -> tuple[Tensor, Tensor]:
    """One optimizer step on a worker's part of a global batch.

    DDP averages gradients over the workers, so the local sum is scaled by workers / global target tokens: the gradient
    is then that of the mean over the global batch, for any number of workers.

    Args:
        model: the objective, wrapped in DDP or not, in training mode: called with a batch's features, tokens and images
            it returns a summed loss and another sum, as ``TeacherForcing`` and ``SelfCritical`` do.
        batch: on the model's device.
        seed: seed of the run, epoch, step and rank, which alone decide the random numbers of the step (dropout): what
            was drawn before does not matter, so a run may continue from any step.
        compute: ``float32`` or ``bfloat16``, the arithmetic of the passes; weights stay float32.

    Returns:
        the local sums that the model returns, detached.
    """
    # SeedSequence, unlike Python's hash(), is defined for all versions and platforms.
    torch.manual_seed(int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]))
    optimizer.zero_grad(set_to_none=True)
    parts = batch.split(config.gradient_accumulation)
    sums = []
    for number, part in enumerate(parts, 1):
        # Gradients are exchanged once, with those of the last part.
        more = number < len(parts) and isinstance(model, DistributedDataParallel)
        with cast(DistributedDataParallel, model).no_sync() if more else nullcontext():
            with autocast(batch.tokens.device, compute):
                loss, other = model(part.features, part.tokens, part.images)
            (loss * (workers / batch.global_targets)).backward()
        sums.append(torch.stack([loss.detach(), other]))
    if config.rule.clip_norm is not None:
        nn.utils.clip_grad_norm_(model.parameters(), config.rule.clip_norm)
    optimizer.step()
    loss, other = torch.stack(sums).sum(dim=0)
    return loss, other


def check_compute(device: torch.device, compute: str) -> None:
    """
    Raises:
        ConfigError: an LSTM cannot be trained in this arithmetic here; oneDNN has none in bfloat16 for such processors.
    """
    if device.type == "cpu" and compute == "bfloat16" and not has_avx512():
        raise ConfigError(
            "compute: bfloat16 wants AVX512 or a GPU, this processor has neither; leave it at auto"
        )


def autocast(device: torch.device, compute: str) -> torch.autocast:
    """bfloat16 autocasting, or none."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=compute == "bfloat16")


def require_finite(loss: float, epoch: int, what: str) -> None:
    """
    Raises:
        TrainingError: the loss is not finite.
    """
    if not math.isfinite(loss):
        raise TrainingError(
            f"{what} loss is {loss} in epoch {epoch + 1}: lower optimizer.learning-rate or set "
            "optimizer.clip-norm, and give another output"
        )
