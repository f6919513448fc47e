"""Captions of a split as tokens, and batches of them with the features of their images.

Shapes: N captions of the split, I images of a batch, K captions of each, T tokens.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from captioner.config import TextConfig
from captioner.models.base import Features
from captioner.store import FeatureStore
from captioner.text import PAD, START, Vocabulary, clean
from captioner.training.plan import Indices, Plan

Reader = Callable[[list[Indices]], Iterator[Features]]
"""Features (float32) of each batch of images, given as their rows in the split in the order of ids."""


@dataclass(frozen=True)
class Batch:
    """One worker's share of a global batch."""

    features: Features
    """Columns of I images, float32."""
    tokens: Tensor
    """int64 [I * K, T]; the captions of an image follow each other."""
    captions: Indices
    """int64 [I, K]: numbers of the captions, -1 where an image has fewer."""
    global_targets: int
    """Next words in the global batch, over all workers: what the loss is divided by."""


class CaptionData:
    """A split's captions as tokens."""

    def __init__(self, captions: list[list[int]], image_rows: Indices):
        """
        Args:
            captions: token ids of N captions, ``<start>`` first, ``<end>`` last.
            image_rows: int64 [N], each caption's image: its row in the split, in the order of ids.
        """
        self.lengths = np.array([len(caption) for caption in captions])
        self.image_rows = image_rows
        self._tokens = np.full((len(captions), int(self.lengths.max())), PAD, np.int32)
        for row, caption in enumerate(captions):
            self._tokens[row, : len(caption)] = caption

    @classmethod
    def load(
        cls, store: FeatureStore, split: str, vocabulary: Vocabulary, text: TextConfig
    ) -> "CaptionData":
        """Every caption of the good images of a split.

        Raises:
            StoreError: the split or its captions are missing.
        """
        rows = {name: row for row, name in enumerate(store.image_ids(split))}
        captions, image_rows = [], []
        for name, texts in store.captions(split).items():
            for caption in texts:
                captions.append(vocabulary.encode(clean(caption, text.rules), text.max_length))
                image_rows.append(rows[name])
        return cls(captions, np.array(image_rows))

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def words(self) -> int:
        """Next words to predict."""
        return int(self.lengths.sum()) - len(self)

    def caption(self, number: int) -> list[int]:
        """Token ids of one caption, both tags included."""
        tokens: list[int] = self._tokens[number, : self.lengths[number]].tolist()
        return tokens

    def batches(self, plan: Plan, rank: int, read: Reader) -> Iterator[Batch]:
        """A worker's share of each step; every worker gets the same number of batches.

        A worker to whom a step leaves nothing gets an empty picture with an empty caption, which counts for nothing, so
        that it takes part in the exchange of gradients.
        """
        shares = [step[rank] for step in plan]
        features = read([self.image_rows[share[:, 0]] for share in shares])
        for step, share, columns in zip(plan, shares, features, strict=True):
            present = [part[part >= 0] for part in step]
            longest = max(int(self.lengths[part].max()) for part in present if len(part))
            targets = sum(int(self.lengths[part].sum()) - len(part) for part in present)
            if not len(share):
                share = np.full((1, share.shape[1]), -1)
                columns = {
                    name: column.new_zeros(1, *column.shape[1:]) for name, column in columns.items()
                }
            numbers = share.ravel()
            tokens = self._tokens[numbers, :longest].astype(np.int64)
            tokens[numbers < 0] = [START] + [PAD] * (longest - 1)
            yield Batch(columns, torch.from_numpy(tokens), share, targets)
