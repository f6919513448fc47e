"""Two ways for features to reach a worker: all of them at hand, or streamed from the store, window by window.

Both give batches of the same form from the same plan.
"""

import os
import tempfile
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from captioner.artifacts.feature_store import FeatureStore
from captioner.config import TrainConfig
from captioner.decoders.base import Decoder, Standardize
from captioner.encoders.spec import Column
from captioner.images.views import view_names
from captioner.text import Vocabulary
from captioner.training.data import CaptionData, Pass
from captioner.training.resident import Resident
from captioner.training.streaming import Streaming
from captioner.training.views import by_view, stored_columns


class Ingest(Protocol):
    """A split as one worker gets it."""

    data: CaptionData

    def epoch(self, number: int) -> Pass:
        """Every caption once, in an order drawn from the seed and this number, counted from 0. Of each image one of its
        views, sampled uniformly."""

    def ordered(self, *, images: int | None = None) -> Pass:
        """Every caption once, always in the same order, with the image itself: for validation.

        Args:
            images: take so many images in a step, with all captions of each; None: ``global_batch`` captions.
        """

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
    neighbours: int,
    memory: int,
) -> Ingest:
    """A split by the ingest that ``config.ingest`` asks for.

    ``auto``: in memory what takes at most half of this worker's part of it, in a mapped file what fits on the disk
    with as much to spare, else streamed.

    Args:
        neighbours: workers on this node.
        memory: bytes that this node, or its container, has in all.

    Raises:
        StoreError: the split, a column or the captions are missing.
    """
    data = CaptionData.load(store, split, vocabulary, config.text)
    others = view_names(config.mirrored, config.crops) if split == "train" else ()
    views = ("", *others)
    stored = stored_columns(columns, views)
    size = store.manifest.splits[split].images * sum(map(store.column_bytes, stored))
    fits = size <= memory // 2 // neighbours
    if config.ingest == "streaming":
        return Streaming(data, store, split, columns, views, config, rank, workers)
    folder = None
    if not fits:
        folder = Path(tempfile.mkdtemp(prefix="captioner-"))
        disk = os.statvfs(folder)
        if config.ingest == "auto" and 2 * size * neighbours > disk.f_bavail * disk.f_frsize:
            folder.rmdir()
            return Streaming(data, store, split, columns, views, config, rank, workers)
    table = store.load(split, stored, folder)
    if folder is not None:
        # The mapping keeps the files alive until this process ends, whichever way it ends.
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    tensors = {name: torch.from_numpy(column) for name, column in table.columns.items()}
    return Resident(data, by_view(tensors, columns, views), config, rank, workers)


def fit_standardize(decoder: Decoder, split: Ingest, *, whole: bool) -> None:
    """Fit each ``Standardize`` of a decoder to its own column of a split."""
    statistics = {column: split.statistics(column) for column in decoder.columns}
    for part in decoder.modules():
        if isinstance(part, Standardize):
            part.fit(*statistics[part.column], whole=whole)
