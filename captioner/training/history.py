"""The record of a run: its epochs, which of them is published, and how time is measured."""

import json
import time
from collections.abc import Iterator, Sequence
from typing import Literal

from captioner.artifacts.schema import Record
from captioner.config import TrainConfig
from captioner.training.data import Batch


class EpochRecord(Record):
    """One epoch, as in ``history.parquet``. Losses are nats per next word under teacher forcing."""

    epoch: int
    """Counted from 1."""
    phase: Literal["cross_entropy", "self_critical"] = "cross_entropy"
    train_loss: float | None
    """None, like the accuracy, in the self-critical phase, which has no references to predict. Of an ensemble both are
    means over its members, while validation is of their mean probabilities."""
    train_accuracy: float | None
    train_reward: float | None = None
    """Mean CIDEr-D of the captions drawn, in the self-critical phase; of an ensemble each member's own."""
    validation_loss: float
    validation_accuracy: float
    validation_cider: float | None = None
    """CIDEr-D of greedy captions on token ids, where it was asked for and in the self-critical phase; near the standard
    protocol's."""
    learning_rate: float
    """Of the epoch's last step."""
    seconds: float
    """Training alone, validation left out."""
    captions_per_second: float
    """Captions of the train split, or captions drawn."""
    data_wait_fraction: float
    """Share of those seconds in which the first worker waited for its batches."""


class Stopwatch:
    """Iterates over batches and measures how long that took, and how much of it went by in waiting for them."""

    def __init__(self, batches: Iterator[Batch]):
        self.batches = batches
        self.seconds = self.waited = 0.0
        self._started = self._ticked = time.perf_counter()

    @property
    def elapsed(self) -> float:
        """Seconds since iteration began."""
        return time.perf_counter() - self._started

    def tick(self, seconds: float) -> bool:
        """Whether so many seconds have gone by since this last was true, or since iteration began."""
        now = time.perf_counter()
        due = now - self._ticked >= seconds
        if due:
            self._ticked = now
        return due

    def __iter__(self) -> Iterator[Batch]:
        started = self._started = self._ticked = time.perf_counter()
        while True:
            before = time.perf_counter()
            batch = next(self.batches, None)
            self.waited += time.perf_counter() - before
            if batch is None:
                break
            yield batch
        self.seconds = time.perf_counter() - started


def best_epoch(history: Sequence[EpochRecord]) -> EpochRecord:
    """The epoch whose weights are published: of the last phase, the one with the lowest validation loss or, where
    captions are scored, the highest validation CIDEr."""
    last = [record for record in history if record.phase == history[-1].phase]
    if history[-1].validation_cider is None:
        return min(last, key=lambda record: record.validation_loss)
    return max(last, key=lambda record: record.validation_cider or 0.0)


def read_history(text: str) -> list[EpochRecord]:
    """Parse a checkpoint's history."""
    return [EpochRecord.model_validate(epoch) for epoch in json.loads(text)]


def epoch_line(history: Sequence[EpochRecord], config: TrainConfig, *, improved: bool) -> str:
    """The last epoch in one line, with a star where its weights are the best so far."""
    record = history[-1]
    if record.phase == "cross_entropy":
        epochs = config.epochs
        figures = (
            f"train loss {record.train_loss:.4f} | validation loss {record.validation_loss:.4f}"
        )
        more = f" | validation accuracy {record.validation_accuracy:.4f}"
    else:
        before = sum(one.phase == "cross_entropy" for one in history)
        epochs = before + config.self_critical.epochs
        figures = (
            f"reward {record.train_reward:.4f} | validation CIDEr {record.validation_cider:.4f}"
        )
        more = ""
    return (
        f"epoch {record.epoch}/{epochs} | {figures}{' *' if improved else ''}{more} | "
        f"{record.captions_per_second:,.0f} captions/s | {record.seconds:.0f} s"
    )
