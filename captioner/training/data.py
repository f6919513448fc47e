"""Captions of a split as tokens, and a pass over them in batches with the features of their images.

Shapes: N captions of the split, I images of a batch, K captions of each, T tokens.
"""

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from captioner.artifacts.feature_store import FeatureStore
from captioner.config import TextConfig, TrainConfig
from captioner.errors import StoreError
from captioner.text import PAD, START, Vocabulary, clean
from captioner.training.plan import Indices, Plan, caption_units, first_captions

Columns = dict[Any, Tensor]
"""What a network reads of I images, by name: ``Features``, float32, or pixels, uint8."""

Reader = Callable[[list[Indices]], Iterator[Columns]]
"""Columns of each batch of images, given as their rows in the split in the order of ids."""


@dataclass(frozen=True)
class Batch:
    """One worker's share of a global batch."""

    features: Columns
    """Of I images."""
    tokens: Tensor
    """int64 [I * K, T]; the captions of an image follow each other."""
    captions: Indices
    """int64 [I, K]: numbers of the captions, -1 where an image has fewer."""
    images: Indices
    """int64 [I]: rows of the split, -1 where a worker has none."""
    global_targets: int
    """Target tokens of the global batch, over all workers: what the loss is divided by."""

    def to(self, device: torch.device) -> "Batch":
        """The batch with its tensors on a device; from pinned memory the copies are not waited for."""
        features = {
            name: column.to(device, non_blocking=True) for name, column in self.features.items()
        }
        return replace(self, features=features, tokens=self.tokens.to(device, non_blocking=True))

    def pinned(self) -> "Batch":
        """The batch with its tensors in memory that a GPU copies from by itself."""
        features = {name: column.pin_memory() for name, column in self.features.items()}
        return replace(self, features=features, tokens=self.tokens.pin_memory())

    def split(self, parts: int) -> list["Batch"]:
        """The batch in at most so many parts of whole images."""
        images, captions = self.captions.shape
        size = -(-images // parts)
        features = {name: torch.split(column, size) for name, column in self.features.items()}
        return [
            replace(
                self,
                features={name: pieces[number] for name, pieces in features.items()},
                tokens=tokens,
                captions=self.captions[number * size : (number + 1) * size],
                images=self.images[number * size : (number + 1) * size],
            )
            for number, tokens in enumerate(torch.split(self.tokens, size * captions))
        ]


class CaptionData:
    """A split's captions as tokens, some 80 bytes each."""

    def __init__(self, captions: Iterable[Sequence[int]], image_rows: Indices):
        """
        Args:
            captions: token ids of N captions, ``<start>`` first, ``<end>`` last.
            image_rows: int64 [N], each caption's image: its row in the split, in the order of ids.
        """
        tokens, ends = array("i"), array("q", [0])
        for caption in captions:
            tokens.extend(caption)
            ends.append(len(tokens))
        self._tokens = np.frombuffer(tokens, np.int32)
        self._starts = np.array(ends[:-1])
        self.lengths = np.diff(ends)
        self.image_rows = image_rows

    @classmethod
    def load(
        cls, store: FeatureStore, split: str, vocabulary: Vocabulary, text: TextConfig
    ) -> "CaptionData":
        """Every caption of the good images of a split that has words.

        Raises:
            StoreError: the split or its captions are missing, or none has a word.
        """
        data = cls.encode(store.caption_batches(split), vocabulary, text)
        if not len(data):
            raise StoreError(f"{store.uri}: no caption of the {split} split has a word")
        return data

    @classmethod
    def encode(
        cls,
        batches: Iterable[tuple[Indices, Indices, Sequence[str]]],
        vocabulary: Vocabulary,
        text: TextConfig,
    ) -> "CaptionData":
        """Captions that have words.

        Args:
            batches: int64 [N], each caption's image; int64 [N], its place among those of its image; the N captions.
        """
        rows, places = array("q"), array("q")

        def encoded() -> Iterator[list[int]]:
            for images, numbers, captions in batches:
                words = [clean(caption, text.rules) for caption in captions]
                # "..." or a smile: nothing to be learnt but to say nothing.
                wordy = np.fromiter(map(bool, words), bool, len(words))
                rows.frombytes(images[wordy].tobytes())
                places.frombytes(numbers[wordy].tobytes())
                for some in filter(None, words):
                    yield vocabulary.encode(some, text.max_length)

        data = cls(encoded(), np.empty(0, np.int64))
        order = np.lexsort((places, rows))
        data.image_rows = np.frombuffer(rows, np.int64)[order]
        data._starts, data.lengths = data._starts[order], data.lengths[order]
        return data

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def targets(self) -> int:
        """Target tokens: all but each ``<start>``."""
        return int(self.lengths.sum()) - len(self)

    def caption(self, number: int) -> list[int]:
        """Token ids of one caption, both tags included."""
        start = self._starts[number]
        tokens: list[int] = self._tokens[start : start + self.lengths[number]].tolist()
        return tokens

    def padded(self, numbers: Indices, longest: int) -> Tensor:
        """Captions as int64 [len(numbers), longest]; a number below 0 stands for one without words."""
        place = np.arange(longest)
        there = (place < self.lengths[numbers][:, None]) & (numbers >= 0)[:, None]
        tokens = np.full(there.shape, PAD, np.int64)
        tokens[there] = self._tokens[(self._starts[numbers][:, None] + place)[there]]
        tokens[numbers < 0, 0] = START
        return torch.from_numpy(tokens)


@dataclass(frozen=True)
class Done:
    """Steps of an epoch that are over."""

    steps: int
    workers: int
    """Who shared them."""


@dataclass(frozen=True)
class Pass:
    """One worker's batches of one pass over a split, or of the rest of one; every worker has the same number of
    them."""

    data: CaptionData
    plan: Plan
    rank: int
    read: Reader

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[Batch]:
        """The batches in the order of the plan.

        A worker to whom a step leaves nothing gets an empty picture with an empty caption, which counts for nothing, so
        that it takes part in the exchange of gradients.
        """
        data, shares = self.data, [step[self.rank] for step in self.plan]
        features = self.read([data.image_rows[share[:, 0]] for share in shares])
        for step, share, columns in zip(self.plan, shares, features, strict=True):
            present = [part[part >= 0] for part in step]
            longest = max(int(data.lengths[part].max()) for part in present if len(part))
            targets = sum(int(data.lengths[part].sum()) - len(part) for part in present)
            if not len(share):
                share = np.full((1, share.shape[1]), -1)
                columns = {
                    name: column.new_zeros(1, *column.shape[1:]) for name, column in columns.items()
                }
            first = share[:, 0]
            images = np.where(first >= 0, data.image_rows[first], -1)
            yield Batch(columns, data.padded(share.ravel(), longest), share, images, targets)


def on_device(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Batches on a device. Where that is no CPU, which has nothing to wait for, a thread reads the next one ahead."""
    if device.type == "cpu":
        yield from batches
        return

    def read() -> Batch | None:
        batch = next(batches, None)
        return batch.pinned() if batch is not None and device.type == "cuda" else batch

    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(read)
        while (batch := ahead.result()) is not None:
            ahead = reader.submit(read)
            yield batch.to(device)


def units_to_learn(data: CaptionData, config: TrainConfig) -> tuple[Indices, int]:
    """Units of an epoch, and how many of their captions make a global batch."""
    if config.objective == "self_critical":
        return first_captions(data.image_rows), max(1, config.global_batch // config.samples)
    return caption_units(data.image_rows, grouped=config.group_captions), config.global_batch


def units_to_judge(
    data: CaptionData, config: TrainConfig, images: int | None
) -> tuple[Indices, int]:
    """Units of a validation pass, and captions in a global batch: with ``images``, so many of them by their first
    captions."""
    if images is not None:
        return first_captions(data.image_rows), images
    return caption_units(data.image_rows, grouped=config.group_captions), config.global_batch
