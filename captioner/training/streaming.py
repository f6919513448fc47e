"""Features of a split that are read from the store window by window.

Why not by Ray Data's ``streaming_split``: an equal split drops rows, an unequal one gives workers different numbers of
steps, and neither repeats its order, so a run could not be resumed to the same end.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from captioner.artifacts.feature_store import Chunk, FeatureStore
from captioner.config import TrainConfig
from captioner.decoders.base import Features
from captioner.encoders.spec import Column
from captioner.training.data import CaptionData, Done, Pass, units_to_judge, units_to_learn
from captioner.training.plan import Indices, Plan, streaming_plan
from captioner.training.views import by_view, moments, pick, sample_views, stored_columns

# A streaming worker holds two windows of features, the one it takes batches from and the one being read.
WINDOW_BYTES = 256 * 2**20
# Statistics of a streamed split come from this many bytes of it, evenly spread.
STATISTICS_BYTES = 2 * 2**30
# Least chunks of each worker, where the store has as many files.
_CHUNKS = 32


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

    def epoch(self, number: int, done: Sequence[Done] = ()) -> Pass:
        units, batch = units_to_learn(self.data, self.config)
        return self._pass(units, batch, number, done)

    def ordered(self, *, images: int | None = None) -> Pass:
        units, batch = units_to_judge(self.data, self.config, images)
        return self._pass(units, batch, None)

    def statistics(self, column: Column) -> tuple[Tensor, Tensor]:
        """As ``Ingest.statistics``, from at most 2 GiB of the split, evenly spread."""
        total = sum(len(chunk.rows) for chunk in self.chunks) * self.store.column_bytes(column)
        stride = max(1, -(-total // STATISTICS_BYTES))
        return moments(
            torch.from_numpy(chunk.read((column,))[column]) for chunk in self.chunks[::stride]
        )

    def windows(self, epoch: int | None, workers: int) -> list[list[list[int]]]:
        """Chunks of every worker in every window of a pass: of an epoch in a random order, of None as they lie."""
        order = np.arange(len(self.chunks))
        if epoch is not None:
            order = np.random.default_rng((self.config.seed, epoch, 2)).permutation(order)
        size = self.per_window * workers
        return [
            [order[start : start + size][rank::workers].tolist() for rank in range(workers)]
            for start in range(0, len(order), size)
        ]

    def _pass(
        self, units: Indices, batch: int, epoch: int | None, done: Sequence[Done] = ()
    ) -> Pass:
        """A pass that takes one window of the store after the other."""
        plan: Plan | None = None
        for part in done:
            plan = self._plan(units, batch, epoch, part.workers)
            seen = [share[:, 0] for step in plan[: part.steps] for share in step]
            units = units[~np.isin(units[:, 0], np.concatenate([units[:0, 0], *seen]))]
            plan = plan[part.steps :]
        # Other workers take other steps: of the units that are left.
        if plan is None or done[-1].workers != self.workers:
            plan = self._plan(units, batch, epoch, self.workers)
        shown = None
        if epoch is not None:
            shown = sample_views(self.data, len(self.views), self.config.seed, epoch)
        shares = [window[self.rank] for window in self.windows(epoch, self.workers)]
        return Pass(self.data, plan, self.rank, lambda images: self._read(images, shares, shown))

    def _plan(self, units: Indices, batch: int, epoch: int | None, workers: int) -> Plan:
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
            for window in self.windows(epoch, workers)
        ]
        return streaming_plan(
            drawn,
            self.data.lengths,
            batch,
            epoch or 0,
            self.config.seed,
            shuffle=epoch is not None,
        )

    def _read(
        self, images: list[Indices], shares: list[list[int]], shown: Indices | None
    ) -> Iterator[Features]:
        """Features of each batch of images, which come window by window."""
        place = np.full(len(self.chunk_of), -1)
        held: Indices = np.empty(0, np.int64)
        window: list[Features] = []
        # Of an epoch that is continued, only what is left of it.
        wanted = set(self.chunk_of[np.concatenate([held, *images])].tolist())
        shares = [share for share in shares if not wanted.isdisjoint(share)]
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
