"""Two ways for features to reach a worker: all of them at hand, or streamed from the store, window by window.

Both give batches of the same form from the same plan. Why streaming is not Ray Data's ``streaming_split``: an equal
split drops rows, an unequal one gives workers different numbers of steps, and neither repeats its order, so a run could
not be resumed to the same end.
"""

import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from captioner.artifacts.feature_store import Chunk, FeatureStore
from captioner.artifacts.schema import view_names
from captioner.config import TrainConfig
from captioner.decoders.base import Features
from captioner.text import Vocabulary
from captioner.training.data import Batch, CaptionData
from captioner.training.plan import (
    Indices,
    Plan,
    caption_units,
    epoch_plan,
    sequential_plan,
    streaming_plan,
)

logger = logging.getLogger(__name__)

# A streaming worker holds two windows of features, the one it draws from and the one being read.
WINDOW_BYTES = 256 * 2**20
# Statistics of a streamed split come from this many bytes of it, evenly spread.
STATISTICS_BYTES = 2 * 2**30
# Least chunks of each worker, where the store has as many files.
_CHUNKS = 32


class Resident:
    """All features of a split in memory, or in files mapped to it."""

    def __init__(
        self,
        data: CaptionData,
        columns: dict[str, np.ndarray[Any, Any]],
        config: TrainConfig,
        rank: int,
        workers: int,
    ):
        self.data, self.config, self.rank, self.workers = data, config, rank, workers
        self.columns = {name: torch.from_numpy(column) for name, column in columns.items()}

    def plan(self, epoch: int | None, *, images: int | None = None) -> Plan:
        """Steps of an epoch, counted from 0; None: of a validation pass.

        Args:
            images: take so many images in a step, with all captions of each; None: ``global_batch`` captions.
        """
        units, batch = _units(self.data, self.config, images)
        lengths, workers = self.data.lengths, self.workers
        if epoch is None:
            return sequential_plan(units, lengths, batch, workers)
        return epoch_plan(units, lengths, batch, epoch, self.config.seed, workers)

    def batches(self, plan: Plan, epoch: int | None) -> Iterator[Batch]:
        """This worker's share of every step of ``plan(epoch)``."""
        shown = shown_views(self.data, self.config, epoch)
        return self.data.batches(plan, self.rank, lambda images: self._read(images, shown))

    def statistics(self, column: str) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation per channel over all images (and cells), float32 [C] each."""
        return moments(iter(torch.split(self.columns[column], 512)))

    def _read(self, images: list[Indices], shown: Indices) -> Iterator[Features]:
        for rows in images:
            yield pick(self.columns, rows, shown[rows], views(self.config))


class Streaming:
    """Features of a split, read from the store's files again in every epoch; of the whole split only the captions'
    tokens stay in memory."""

    def __init__(
        self,
        data: CaptionData,
        store: FeatureStore,
        split: str,
        columns: tuple[str, ...],
        config: TrainConfig,
        rank: int,
        workers: int,
        window_bytes: int = WINDOW_BYTES,
    ):
        self.data, self.store, self.columns, self.config = data, store, columns, config
        self.rank, self.workers = rank, workers
        images = window_bytes // sum(store.column_bytes(name) for name in columns)
        # Windows of several chunks, so that neighbours in a file do not meet in every epoch. And many chunks for every
        # worker, so that none is left without one while the others go on: steps would then be of fewer captions.
        wanted = min(images // 8, store.manifest.splits[split].ok // (_CHUNKS * workers))
        self.chunks = store.chunks(split, max(1, wanted))
        self.per_window = max(1, images // max(len(chunk.rows) for chunk in self.chunks))
        self.chunk_of = np.empty(sum(len(chunk.rows) for chunk in self.chunks), np.int64)
        for number, chunk in enumerate(self.chunks):
            self.chunk_of[chunk.rows] = number

    def windows(self, epoch: int | None) -> list[list[list[int]]]:
        """Chunks of every worker in every window of a pass."""
        order = np.arange(len(self.chunks))
        if epoch is not None:
            order = np.random.default_rng((self.config.seed, epoch, 2)).permutation(order)
        size = self.per_window * self.workers
        return [
            [
                order[start : start + size][rank :: self.workers].tolist()
                for rank in range(self.workers)
            ]
            for start in range(0, len(order), size)
        ]

    def plan(self, epoch: int | None, *, images: int | None = None) -> Plan:
        """As ``Resident.plan``, in an order that takes one window of the store after the other."""
        units, batch = _units(self.data, self.config, images)
        chunk = self.chunk_of[self.data.image_rows[units[:, 0]]]
        by_chunk = units[np.argsort(chunk, kind="stable")]
        bounds = np.searchsorted(np.sort(chunk), np.arange(len(self.chunks) + 1))
        windows = [
            [
                np.concatenate(
                    [units[:0], *(by_chunk[bounds[one] : bounds[one + 1]] for one in share)]
                )
                for share in window
            ]
            for window in self.windows(epoch)
        ]
        return streaming_plan(
            windows,
            self.data.lengths,
            batch,
            epoch or 0,
            self.config.seed,
            shuffle=epoch is not None,
        )

    def batches(self, plan: Plan, epoch: int | None) -> Iterator[Batch]:
        """This worker's share of every step of ``plan(epoch)``."""
        shares = [window[self.rank] for window in self.windows(epoch)]
        shown = shown_views(self.data, self.config, epoch)
        return self.data.batches(plan, self.rank, lambda images: self._read(images, shares, shown))

    def statistics(self, column: str) -> tuple[Tensor, Tensor]:
        """As ``Resident.statistics``, from at most 2 GiB of the split, evenly spread."""
        total = sum(len(chunk.rows) for chunk in self.chunks) * self.store.column_bytes(column)
        stride = max(1, -(-total // STATISTICS_BYTES))
        return moments(
            torch.from_numpy(self.store.read_chunk(chunk, (column,))[column])
            for chunk in self.chunks[::stride]
        )

    def _read(
        self, images: list[Indices], shares: list[list[int]], shown: Indices
    ) -> Iterator[Features]:
        place = np.full(len(self.chunk_of), -1)
        held: Indices = np.empty(0, np.int64)
        window: dict[str, Tensor] = {}
        with ThreadPoolExecutor(1) as reader:
            coming = iter([*shares, []])
            ahead = reader.submit(self._load, next(coming))
            for rows in images:
                while len(rows) and place[rows[0]] < 0 or not window:
                    place[held] = -1
                    # The old window goes before the next but one is read beside the new one.
                    window = {}
                    held, window = ahead.result()
                    place[held] = np.arange(len(held))
                    ahead = reader.submit(self._load, next(coming))
                yield pick(window, place[rows], shown[rows], views(self.config))

    def _load(self, share: list[int]) -> tuple[Indices, dict[str, Tensor]]:
        """Rows and features of one window's chunks."""
        chunks: list[Chunk] = [self.chunks[number] for number in share]
        rows = np.concatenate([self.chunks[0].rows[:0], *(chunk.rows for chunk in chunks)])
        window: dict[str, Tensor] = {}
        start = 0
        # Filled chunk by chunk: a second copy of the window would be its largest expense.
        for chunk in chunks or self.chunks[:1]:
            for name, column in self.store.read_chunk(chunk, self.columns).items():
                part = torch.from_numpy(column)
                if name not in window:
                    window[name] = part.new_empty(len(rows), *part.shape[1:])
                window[name][start : start + len(chunk.rows)] = part[: len(rows) - start]
            start += len(chunk.rows)
        return rows, window


def views(config: TrainConfig) -> tuple[str, ...]:
    """Names of all views of an image that training shows, its own first."""
    return ("", *view_names(config.mirrored, config.crops))


def shown_views(data: CaptionData, config: TrainConfig, epoch: int | None) -> Indices:
    """Which of its ``views`` an epoch shows of each image of a split, int64; in validation the image itself."""
    images = int(data.image_rows.max()) + 1
    if epoch is None:
        return np.zeros(images, np.int64)
    generator = np.random.default_rng((config.seed, epoch, 3))
    return generator.integers(len(views(config)), size=images)


def pick(
    columns: dict[str, Tensor], rows: Indices, shown: Indices, names: Sequence[str]
) -> Features:
    """Rows of feature columns as float32.

    Args:
        rows: int64 [I].
        shown: int64 [I], the place in ``names`` of the view to take of each.
        names: what the columns of each view have after their names; "" of the images themselves.
    """
    parts = [(names[view], np.flatnonzero(shown == view)) for view in np.unique(shown)]
    features = {}
    for name, column in columns.items():
        if any(view and name.endswith(view) for view in names):
            continue
        features[name] = torch.empty(len(rows), *column.shape[1:])
        for view, places in parts:
            chosen = columns[f"{name}{view}"][torch.from_numpy(rows[places])]
            features[name][torch.from_numpy(places)] = chosen.float()
    return features


def _units(data: CaptionData, config: TrainConfig, images: int | None) -> tuple[Indices, int]:
    """Units of a pass, and captions in a global batch."""
    units = caption_units(data.image_rows, grouped=config.group_captions or images is not None)
    return units, config.global_batch if images is None else images * units.shape[1]


def open_split(
    store: FeatureStore,
    split: str,
    columns: tuple[str, ...],
    vocabulary: Vocabulary,
    config: TrainConfig,
    *,
    rank: int,
    workers: int,
    neighbours: int,
    memory: int,
) -> Resident | Streaming:
    """A split by the way in that ``config.ingest`` asks for.

    ``auto``: in memory what takes at most half of this worker's part of it, in a mapped file what fits on the disk
    with as much to spare, else streamed.

    Args:
        neighbours: workers on this node.
        memory: bytes that this node, or its container, has in all.

    Raises:
        StoreError: the split, a column or the captions are missing.
    """
    data = CaptionData.load(store, split, vocabulary, config.text)
    if split == "train":
        columns = tuple(f"{name}{view}" for view in views(config) for name in columns)
    size = store.manifest.splits[split].ok * sum(store.column_bytes(name) for name in columns)
    fits = size <= memory // 2 // neighbours
    if config.ingest == "streaming":
        return Streaming(data, store, split, columns, config, rank, workers)
    folder = None
    if not fits:
        folder = Path(tempfile.mkdtemp(prefix="captioner-"))
        disk = os.statvfs(folder)
        if config.ingest == "auto" and 2 * size * neighbours > disk.f_bavail * disk.f_frsize:
            folder.rmdir()
            return Streaming(data, store, split, columns, config, rank, workers)
    table = store.load(split, columns, folder)
    if folder is not None:
        # The mapping keeps the files alive until this process ends, whichever way it ends.
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    return Resident(data, table.columns, config, rank, workers)


def moments(pieces: Iterator[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel of pieces [..., C], float32 [C] each."""
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for piece in pieces:
        flat = piece.reshape(-1, piece.shape[-1]).double()
        count += len(flat)
        total = total + flat.sum(0)
        squares = squares + flat.square().sum(0)
    mean = total / count
    return mean.float(), (squares / count - mean.square()).clamp(min=0).sqrt().float()
