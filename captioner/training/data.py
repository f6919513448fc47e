"""Captions and features of a split in memory, and the order in which training sees them.

Shapes: N captions, B captions of a batch, T tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from captioner.config import TextConfig
from captioner.models.base import Features
from captioner.store import FeatureStore
from captioner.text import PAD, Vocabulary, clean

# Captions are sorted by length within windows of this many batches, so that a batch holds captions of similar length
# and little padding, while the order across windows stays random.
WINDOW = 40

Indices = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Batch:
    """One worker's part of a global batch."""

    features: Features
    tokens: Tensor
    """int64 [B, T]."""
    global_targets: int
    """Next words in the global batch, over all workers: what the loss is divided by."""


class CaptionData:
    """A split's captions as tokens, with the features of their images."""

    def __init__(
        self,
        captions: list[list[int]],
        image_rows: Indices,
        columns: dict[str, np.ndarray[Any, Any]],
    ):
        """
        Args:
            captions: token ids of N captions, ``<start>`` first, ``<end>`` last.
            image_rows: int64 [N], each caption's row in the columns.
            columns: feature columns of the images.
        """
        self.lengths = np.array([len(caption) for caption in captions])
        self.image_rows = image_rows
        self.columns = {name: torch.from_numpy(column) for name, column in columns.items()}
        self._tokens = np.full((len(captions), int(self.lengths.max())), PAD, np.int32)
        for row, caption in enumerate(captions):
            self._tokens[row, : len(caption)] = caption

    @classmethod
    def load(
        cls,
        store: FeatureStore,
        split: str,
        columns: tuple[str, ...],
        vocabulary: Vocabulary,
        text: TextConfig,
    ) -> "CaptionData":
        """Every caption of the good images of a split.

        Raises:
            StoreError: the split, a column or the captions are missing.
        """
        table = store.load(split, columns)
        rows = {name: row for row, name in enumerate(table.image_ids)}
        captions, image_rows = [], []
        for name, texts in store.captions(split).items():
            for caption in texts:
                captions.append(vocabulary.encode(clean(caption, text.rules), text.max_length))
                image_rows.append(rows[name])
        return cls(captions, np.array(image_rows), table.columns)

    def __len__(self) -> int:
        return len(self.lengths)

    def statistics(self, column: str) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation per channel over all images (and cells), float32 [C] each."""
        values = self.columns[column]
        count, total, squares = 0, torch.zeros(values.shape[-1]), torch.zeros(values.shape[-1])
        for piece in values.split(512):
            flat = piece.reshape(-1, values.shape[-1]).double()
            count += len(flat)
            total = total + flat.sum(0)
            squares = squares + flat.square().sum(0)
        mean = total / count
        return mean.float(), (squares / count - mean.square()).clamp(min=0).sqrt().float()

    def batches(self, order: list[Indices], rank: int, workers: int) -> Iterator[Batch]:
        """This worker's part of each global batch; every worker gets the same number of batches.

        A worker for whom an uneven last batch leaves nothing gets one caption that counts for nothing, so that it takes
        part in the exchange of gradients.
        """
        for batch in order:
            mine = batch[rank::workers]
            targets = int(self.lengths[batch].sum() - len(batch))
            tokens = self._tokens[mine if len(mine) else batch[:1], : self.lengths[batch].max()]
            tokens = torch.from_numpy(tokens.astype(np.int64))
            if not len(mine):
                tokens[:, 1:] = PAD
                mine = batch[:1]
            rows = torch.from_numpy(self.image_rows[mine])
            features = {name: column[rows].float() for name, column in self.columns.items()}
            yield Batch(features, tokens, targets)


def epoch_order(
    lengths: np.ndarray[Any, Any], global_batch: int, epoch: int, seed: int
) -> list[Indices]:
    """The global batches of one training epoch: every caption exactly once, whatever the number of workers.

    Args:
        lengths: tokens of each caption [N].
        epoch: counted from 0; decides the order together with ``seed``.
    """
    generator = np.random.default_rng((seed, epoch))
    shuffled = generator.permutation(len(lengths))
    window = WINDOW * global_batch
    batches = []
    for start in range(0, len(shuffled), window):
        part = shuffled[start : start + window]
        part = part[np.argsort(lengths[part], kind="stable")]
        batches += [
            part[first : first + global_batch] for first in range(0, len(part), global_batch)
        ]
    return [batches[position] for position in generator.permutation(len(batches))]


def sequential_order(lengths: np.ndarray[Any, Any], global_batch: int) -> list[Indices]:
    """Batches for validation: by length, always the same."""
    by_length = np.argsort(lengths, kind="stable")
    return [
        by_length[start : start + global_batch] for start in range(0, len(by_length), global_batch)
    ]
