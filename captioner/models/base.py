"""The protocol between decoders, training and search.

Shapes: B batch, T tokens, P grid cells, C channels, D width, V vocabulary.
"""

from typing import Protocol

from torch import Tensor

State = dict[str, Tensor]
"""What a decoder remembers between steps. Every tensor has the batch as its first dimension, so search can
reorder, repeat and select beams without knowing the decoder."""

Features = dict[str, Tensor]
"""Columns of the feature store for a batch of images: ``pooled`` float [B, C] and, if asked for, ``grid`` float [B, P, C]."""


class Decoder(Protocol):
    """A decoder over whole captions (``forward``, teacher forcing) and one word at a time (``start`` and ``step``)."""

    columns: tuple[str, ...]
    """Feature columns it reads: ``("pooled",)`` or ``("grid",)``."""

    def forward(self, features: Features, tokens: Tensor) -> Tensor:
        """Logits of every next word.

        Args:
            features: columns of B images.
            tokens: int64 [B, T], ``<start>`` first, ``<pad>`` after the words.

        Returns:
            float [B, T, V]; position t predicts token t + 1 from tokens 0..t alone.
        """
        ...

    def start(self, features: Features) -> State:
        """State before the first word, for B images."""
        ...

    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State, Tensor | None]:
        """One word further.

        Args:
            tokens: int64 [B], the last word of each caption (``<start>`` first).

        Returns:
            logits float [B, V], the new state, and attention over the grid float [B, P] (None where the decoder has none).
        """
        ...
