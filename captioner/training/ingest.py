"""Two ways for features to reach a worker: all of them at hand, or streamed from the store, window by window.

Both give batches of the same form from the same plan. Why streaming is not Ray Data's ``streaming_split``: an equal
split drops rows, an unequal one gives workers different numbers of steps, and neither repeats its order, so a run could
not be resumed to the same end.
"""

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from captioner.artifacts.feature_store import Chunk, FeatureStore
from captioner.artifacts.tables import column_name
from captioner.config import TrainConfig
from captioner.decoders.base import Decoder, Features, Standardize
from captioner.encoders.spec import Column
from captioner.images.views import view_names
from captioner.text import Vocabulary
from captioner.training.data import CaptionData, Pass
from captioner.training.plan import (
    Indices,
    Plan,
    caption_units,
    epoch_plan,
    sequential_plan,
    streaming_plan,
)

# A streaming worker holds two windows of features, the one it draws from and the one being read.
WINDOW_BYTES = 256 * 2**20
# Statistics of a streamed split come from this many bytes of it, evenly spread.
STATISTICS_BYTES = 2 * 2**30
# Least chunks of each worker, where the store has as many files.
_CHUNKS = 32


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


class Resident:
    """All features of a split in memory, or in files mapped to it."""

    def __init__(
        self,
        data: CaptionData,
        views: Sequence[Features],
        config: TrainConfig,
        rank: int,
        workers: int,
    ):
        """
        Args:
            views: columns of all images of the split, in the order of ids: of the images themselves, then of each of
                their other views.
        """
        self.data, self.views, self.config = data, views, config
        self.rank, self.workers = rank, workers

    def epoch(self, number: int) -> Pass:
        units, batch = _units(self.data, self.config)
        seed = self.config.seed
        plan = epoch_plan(units, self.data.lengths, batch, number, seed, self.workers)
        return self._pass(plan, sample_views(self.data, len(self.views), seed, number))

    def ordered(self, *, images: int | None = None) -> Pass:
        units, batch = _units(self.data, self.config, images)
        return self._pass(sequential_plan(units, self.data.lengths, batch, self.workers), None)

    def statistics(self, column: Column) -> tuple[Tensor, Tensor]:
        return moments(iter(torch.split(self.views[0][column], 512)))

    def _pass(self, plan: Plan, shown: Indices | None) -> Pass:
        def read(images: list[Indices]) -> Iterator[Features]:
            for rows in images:
                yield pick(self.views, rows, None if shown is None else shown[rows])

        return Pass(self.data, plan, self.rank, read)


class Streaming:
    """Features of a split, read from the store's files again in every epoch; of the whole split only the captions'
    tokens stay in memory."""

    def __init__(
        self,
        data: CaptionData,
        store: FeatureStore,
        split: str,
        columns: tuple[Column, ...],
        views: tuple[str, ...],
        config: TrainConfig,
        rank: int,
        workers: int,
        window_bytes: int = WINDOW_BYTES,
    ):
        """
        Args:
            views: of an image, "" for itself first.
        """
        self.data, self.store, self.config = data, store, config
        self.columns, self.views = columns, views
        self.rank, self.workers = rank, workers
        images = window_bytes // sum(map(store.column_bytes, stored_columns(columns, views)))
        # Windows of several chunks, so that neighbours in a file do not meet in every epoch. And many chunks for every
        # worker, so that none is left without one while the others go on: steps would then be of fewer captions.
        wanted = min(images // 8, store.manifest.splits[split].images // (_CHUNKS * workers))
        self.chunks = store.chunks(split, max(1, wanted))
        self.per_window = max(1, images // max(len(chunk.rows) for chunk in self.chunks))
        self.chunk_of = np.empty(sum(len(chunk.rows) for chunk in self.chunks), np.int64)
        for number, chunk in enumerate(self.chunks):
            self.chunk_of[chunk.rows] = number

    def epoch(self, number: int) -> Pass:
        units, batch = _units(self.data, self.config)
        return self._pass(units, batch, number)

    def ordered(self, *, images: int | None = None) -> Pass:
        units, batch = _units(self.data, self.config, images)
        return self._pass(units, batch, None)

    def statistics(self, column: Column) -> tuple[Tensor, Tensor]:
        """As ``Ingest.statistics``, from at most 2 GiB of the split, evenly spread."""
        total = sum(len(chunk.rows) for chunk in self.chunks) * self.store.column_bytes(column)
        stride = max(1, -(-total // STATISTICS_BYTES))
        return moments(
            torch.from_numpy(chunk.read((column,))[column]) for chunk in self.chunks[::stride]
        )

    def windows(self, epoch: int | None) -> list[list[list[int]]]:
        """Chunks of every worker in every window of a pass: of an epoch in a random order, of None as they lie."""
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

    def _pass(self, units: Indices, batch: int, epoch: int | None) -> Pass:
        """A pass that takes one window of the store after the other."""
        windows = self.windows(epoch)
        chunk = self.chunk_of[self.data.image_rows[units[:, 0]]]
        by_chunk = units[np.argsort(chunk, kind="stable")]
        bounds = np.searchsorted(np.sort(chunk), np.arange(len(self.chunks) + 1))
        drawn = [
            [
                np.concatenate(
                    [units[:0], *(by_chunk[bounds[one] : bounds[one + 1]] for one in share)]
                )
                for share in window
            ]
            for window in windows
        ]
        seed, shown = self.config.seed, None
        if epoch is not None:
            shown = sample_views(self.data, len(self.views), seed, epoch)
        plan = streaming_plan(
            drawn, self.data.lengths, batch, epoch or 0, seed, shuffle=epoch is not None
        )
        shares = [window[self.rank] for window in windows]
        return Pass(self.data, plan, self.rank, lambda images: self._read(images, shares, shown))

    def _read(
        self, images: list[Indices], shares: list[list[int]], shown: Indices | None
    ) -> Iterator[Features]:
        """Features of each batch of images, which come window by window."""
        place = np.full(len(self.chunk_of), -1)
        held: Indices = np.empty(0, np.int64)
        window: list[Features] = []
        with ThreadPoolExecutor(1) as reader:
            coming = iter([*shares, []])
            ahead = reader.submit(self._load, next(coming))
            for rows in images:
                while len(rows) and place[rows[0]] < 0 or not window:
                    place[held] = -1
                    # The old window goes before the next but one is read beside the new one.
                    window = []
                    held, window = ahead.result()
                    place[held] = np.arange(len(held))
                    ahead = reader.submit(self._load, next(coming))
                yield pick(window, place[rows], None if shown is None else shown[rows])

    def _load(self, share: list[int]) -> tuple[Indices, list[Features]]:
        """Rows and views of one window's chunks."""
        chunks: list[Chunk] = [self.chunks[number] for number in share]
        rows = np.concatenate([self.chunks[0].rows[:0], *(chunk.rows for chunk in chunks)])
        window: dict[str, Tensor] = {}
        start = 0
        # Filled chunk by chunk: a second copy of the window would be its largest expense.
        for chunk in chunks or self.chunks[:1]:
            stored = stored_columns(self.columns, self.views)
            for name, column in chunk.read(stored).items():
                part = torch.from_numpy(column)
                if name not in window:
                    window[name] = part.new_empty(len(rows), *part.shape[1:])
                window[name][start : start + len(chunk.rows)] = part[: len(rows) - start]
            start += len(chunk.rows)
        return rows, by_view(window, self.columns, self.views)


def stored_columns(columns: Sequence[Column], views: Sequence[str]) -> tuple[str, ...]:
    """Names in the store of these columns of these views."""
    return tuple(column_name(column, view) for view in views for column in columns)


def by_view(
    table: Mapping[str, Tensor], columns: Sequence[Column], views: Sequence[str]
) -> list[Features]:
    """The columns of each view, from those of the store."""
    return [{column: table[column_name(column, view)] for column in columns} for view in views]


def sample_views(data: CaptionData, views: int, seed: int, epoch: int) -> Indices:
    """The view that an epoch shows of each image of a split, int64 in [0, views)."""
    generator = np.random.default_rng((seed, epoch, 3))
    return generator.integers(views, size=int(data.image_rows.max()) + 1)


def pick(views: Sequence[Features], rows: Indices, shown: Indices | None) -> Features:
    """Rows of feature columns as float32.

    Args:
        rows: int64 [I].
        shown: int64 [I], the view to take of each; None: the image itself.
    """
    if shown is None:
        shown = np.zeros_like(rows)
    features: Features = {}
    for name, own in views[0].items():
        features[name] = torch.empty(len(rows), *own.shape[1:])
        for view in np.unique(shown):
            places = np.flatnonzero(shown == view)
            chosen = views[view][name][torch.from_numpy(rows[places])]
            features[name][torch.from_numpy(places)] = chosen.float()
    return features


def _units(
    data: CaptionData, config: TrainConfig, images: int | None = None
) -> tuple[Indices, int]:
    """Units of a pass, and captions in a global batch."""
    units = caption_units(data.image_rows, grouped=config.group_captions or images is not None)
    return units, config.global_batch if images is None else images * units.shape[1]


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
