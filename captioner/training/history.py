"""The record of a run: its epochs, which of them is published, and how time is measured."""

import json
import time
from collections.abc import Iterator, Sequence

from captioner.artifacts.manifests import Record
from captioner.config import LearningConfig
from captioner.training.data import Batch


class EpochRecord(Record):
    """One epoch, as in ``history.parquet``. Losses are nats per target token under teacher forcing."""

    epoch: int
    """Counted from 1."""
    train_loss: float | None
    """Of an ensemble, like the accuracy, the mean over its members, while validation is of their mean probabilities.
    None, like the accuracy, of an epoch whose objective is self-critical: it has no next words."""
    train_accuracy: float | None
    train_cider: float | None = None
    """Mean CIDEr-D of the captions drawn, of an epoch whose objective is self-critical."""
    validation_loss: float
    validation_accuracy: float
    validation_cider: float | None = None
    """CIDEr-D of greedy captions on token ids, where it was asked for; near the standard protocol's."""
    learning_rate: float
    """Of the epoch's last step."""
    seconds: float
    """Training alone, validation left out."""
    captions_per_second: float
    data_wait_fraction: float
    """Share of those seconds in which the first worker waited for its batches."""


class Interval:
    """Says when so many seconds have gone by, again and again."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.start()

    def start(self) -> None:
        """Count from now."""
        self._since = time.monotonic()

    def over(self) -> bool:
        """Whether they have gone by since this was last true or ``start`` was called."""
        over = time.monotonic() - self._since >= self.seconds
        if over:
            self.start()
        return over


class Stopwatch:
    """Iterates over batches and measures how long that took, and how much of it went by in waiting for them."""

    def __init__(self, batches: Iterator[Batch], seconds: float = 0.0, waited: float = 0.0):
        """
        Args:
            seconds: that went by before, in the part of the epoch that is over.
            waited: how much of them.
        """
        self.batches = batches
        self.seconds, self.waited = seconds, waited
        self._before = seconds
        self._started = time.perf_counter()

    @property
    def elapsed(self) -> float:
        """Seconds of the epoch so far."""
        return self._before + time.perf_counter() - self._started

    def __iter__(self) -> Iterator[Batch]:
        self._started = time.perf_counter()
        while True:
            before = time.perf_counter()
            batch = next(self.batches, None)
            self.waited += time.perf_counter() - before
            if batch is None:
                break
            yield batch
        self.seconds = self.elapsed


def best_epoch(history: Sequence[EpochRecord]) -> EpochRecord:
    """The epoch whose weights are published: the one with the lowest validation loss or, where captions are scored, the
    highest validation CIDEr-D."""
    if history[-1].validation_cider is None:
        return min(history, key=lambda record: record.validation_loss)
    return max(history, key=lambda record: record.validation_cider or 0.0)


def finished(history: Sequence[EpochRecord], config: LearningConfig) -> bool:
    """Whether all epochs are over, or ``patience`` of them since the lowest validation loss."""
    losses = [record.validation_loss for record in history]
    if config.waits_for_cider:
        losses = [-(record.validation_cider or 0.0) for record in history]
    stale = len(losses) - 1 - losses.index(min(losses)) if losses else 0
    return len(losses) >= config.epochs or (
        config.patience is not None and stale >= config.patience
    )


def read_history(text: str) -> list[EpochRecord]:
    """Parse a checkpoint's history."""
    return [EpochRecord.model_validate(epoch) for epoch in json.loads(text)]


def epoch_line(history: Sequence[EpochRecord], config: LearningConfig, *, improved: bool) -> str:
    """The last epoch in one line, with a star where its weights are the best so far."""
    record = history[-1]
    cider = record.validation_cider
    scored = "" if cider is None else f" | validation CIDEr-D {cider:.4f}"
    trained = (
        f"train CIDEr-D {record.train_cider:.4f}"
        if record.train_loss is None
        else f"train loss {record.train_loss:.4f}"
    )
    return (
        f"epoch {record.epoch}/{config.epochs} | {trained} | "
        f"validation loss {record.validation_loss:.4f}{' *' if improved else ''} | "
        f"validation accuracy {record.validation_accuracy:.4f}{scored} | "
        f"{record.captions_per_second:,.0f} captions/s | {record.seconds:.0f} s"
    )
