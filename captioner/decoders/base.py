"""What training and search know of a decoder.

Shapes: B batch, T tokens, P grid cells, C channels, D width, O output width, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from captioner.encoders.spec import Column, FeatureShape

State = dict[str, Tensor]
"""What a decoder remembers between steps. Every tensor has captions as its first dimension, or images where the
decoder's ``image_state`` names it, so search can reorder, repeat and select beams without knowing the decoder."""

Features = dict[Column, Tensor]
"""Columns of the feature store for a batch of images, float32: ``pooled`` [B, C], ``grid`` [B, P, C]."""


def packs(device: torch.device) -> bool:
    """Whether padding is taken out of a batch on this device. On a GPU it costs less than to wait for how much of it
    there is."""
    return device.type == "cpu"


class Decoder(nn.Module):
    """A decoder over whole captions (``forward``, teacher forcing) and one word at a time (``start`` and ``step``).

    A kind of decoder is a subclass in a module of its name, made of a ``DecoderConfig``, the size of the vocabulary and
    a ``FeatureShape``; ``DecoderKind`` in the configuration lists them.
    """

    columns: tuple[Column, ...]
    """Feature columns it reads, one or both; of a kind they are the class's."""

    attends: bool
    """Whether ``step`` gives attention over the grid; of a kind it is the class's."""

    image_state: frozenset[str]
    """Names of the state tensors that describe the image alone and that ``step`` hands on unchanged. They keep one row
    per image however many captions of it are being written, so that search never copies them for its beams."""

    output: Callable[[Tensor], Tensor]
    """Logits float [..., V] of what ``hidden`` gave [..., O]; apart, so that a loss need not project padding."""

    def hidden(self, features: Features, tokens: Tensor) -> Tensor:
        """What the logits of every target token are projected from.

        Args:
            features: columns of N images.
            tokens: int64 [B, T], ``<start>`` first, ``<pad>`` after the words. The captions of an image follow each
                other, and every image has equally many, B / N.

        Returns:
            float [B, T, O]; position t sees tokens 0..t alone.
        """
        raise NotImplementedError

    def forward(self, features: Features, tokens: Tensor) -> Tensor:
        """Logits of every target token: ``output(hidden(features, tokens))``, float [B, T, V]."""
        return self.output(self.hidden(features, tokens))

    def start(self, features: Features) -> State:
        """State before the first word, for B images and one caption each."""
        raise NotImplementedError

    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State, Tensor | None]:
        """One word further.

        Args:
            tokens: int64 [B], the last word of each caption (``<start>`` first). The captions of an image follow each
                other, and every image has equally many.

        Returns:
            logits float [B, V], the new state, and attention over the grid float [B, P], None of a decoder that does
            not attend to it.
        """
        raise NotImplementedError


def for_captions(values: Tensor, captions: int) -> Tensor:
    """One row per image [N, ...] to one per caption [B, ...], those of an image following each other."""
    each = captions // max(1, len(values))
    return values if each == 1 else values.repeat_interleave(each, dim=0)


def start_captions(decoder: Decoder, features: Features, count: int) -> State:
    """The state before the first word of ``count`` captions of each image, those of an image following each other."""
    return {
        name: tensor if name in decoder.image_state else tensor.repeat_interleave(count, dim=0)
        for name, tensor in decoder.start(features).items()
    }


class Standardize(nn.Module):
    """A feature column on a common scale; the statistics are those of the train split.

    A frozen network's channels differ in scale by orders of magnitude, those of random weights most of all, so each has
    its own mean and deviation; or all have one factor, which leaves the large ones large.
    """

    def __init__(self, column: Column, shape: FeatureShape):
        super().__init__()
        self.column = column
        channels = shape.of(column)[-1]
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("scale", torch.ones(channels))
        self.mean: Tensor
        self.scale: Tensor

    def fit(self, mean: Tensor, deviation: Tensor, *, whole: bool = False) -> None:
        """Set the statistics of the channels, both float32 [C].

        Args:
            whole: divide all channels by the deviation of all values together, and move none. Otherwise a channel that
                never varies is left at zero, not blown up.
        """
        if whole:
            spread = (deviation**2 + (mean - mean.mean()) ** 2).mean().sqrt()
            mean, deviation = torch.zeros_like(mean), spread.expand_as(deviation)
        self.mean.copy_(mean)
        self.scale.copy_(torch.where(deviation > 1e-6 * deviation.max(), deviation, torch.inf))

    def forward(self, features: Features) -> Tensor:
        """The column, standardised: float32 [..., C]."""
        return (features[self.column] - self.mean) / self.scale
