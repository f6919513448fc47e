"""Two ways for features to reach a worker: all of them at hand, or streamed from the store, window by window.

Both give batches of the same form from the same plan.
"""

import hashlib
import os
import tempfile
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from captioner.artifacts.feature_store import FeatureStore
from captioner.config import TrainConfig
from captioner.decoders.base import Decoder, Standardize
from captioner.encoders.spec import Column
from captioner.images.views import view_names
from captioner.text import Vocabulary
from captioner.training.data import CaptionData, Done, Pass
from captioner.training.resident import Resident
from captioner.training.shared import shared_array
from captioner.training.streaming import Streaming
from captioner.training.views import by_view, stored_columns


class Passes(Protocol):
    """A split as one worker gets it."""

    data: CaptionData

    def epoch(self, number: int, done: Sequence[Done] = ()) -> Pass:
        """Every caption once, in an order drawn from the seed and this number, counted from 0. Of each image one of its
        views, sampled uniformly.

        Args:
            done: what is over of the epoch, in order; the pass has the rest.
        """

    def ordered(self, *, images: int | None = None) -> Pass:
        """Every caption once, always in the same order, with the image itself: for validation.

        Args:
            images: take so many images in a step, each with its first caption alone; None: ``global_batch`` captions.
        """


class Ingest(Passes, Protocol):
    """A split of a feature store as one worker gets it."""

    def statistics(self, column: Column) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation per channel over the images (and their cells), float32 [C] each."""


def open_split(
    store: FeatureStore,
    split: str,
    columns: tuple[Column, ...],
    vocabulary: Vocabulary,
    config: TrainConfig,
    *,
    rank: int,
    workers: int,
    memory: int,
) -> Ingest:
    """A split by the ingest that ``config.ingest`` asks for.

    ``auto``: in memory what takes at most half of the node's, in a file on the disk what leaves as much of it free,
    else streamed. What is at hand is there once, for all workers of a node, those of other runs included.

    Args:
        memory: bytes that this node, or its container, has in all.

    Raises:
        StoreError: the split, a column or the captions are missing.
    """
    data = CaptionData.load(store, split, vocabulary, config.text)
    others = view_names(config.mirrored, config.crops) if split == "train" else ()
    views = ("", *others)
    stored = stored_columns(columns, views)
    images = store.manifest.splits[split].images
    size = images * sum(map(store.column_bytes, stored))
    on_disk = size > memory // 2
    disk = os.statvfs(tempfile.gettempdir())
    if config.ingest == "streaming" or (
        config.ingest == "auto" and on_disk and 2 * size > disk.f_bavail * disk.f_frsize
    ):
        return Streaming(data, store, split, columns, views, config, rank, workers)
    described = f"{store.uri}\n{store.manifest.model_dump_json()}"
    content = hashlib.sha256(described.encode()).hexdigest()[:32]
    tensors: dict[str, Tensor] = {}
    for name in stored:
        shape, dtype = store.layout(name)
        column = shared_array(
            f"{content}-{split}-{name}",
            (images, *shape),
            dtype,
            lambda array, name=name: store.fill(split, {name: array}),  # type: ignore[misc]
            on_disk=on_disk,
        )
        tensors[name] = torch.from_numpy(column)
    return Resident(data, by_view(tensors, columns, views), config, rank, workers)


def fit_standardize(decoder: Decoder, split: Ingest, *, whole: bool) -> None:
    """Fit each ``Standardize`` of a decoder to its own column of a split."""
    statistics = {column: split.statistics(column) for column in decoder.columns}
    for part in decoder.modules():
        if isinstance(part, Standardize):
            part.fit(*statistics[part.column], whole=whole)
