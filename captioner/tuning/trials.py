"""The trials of a search: how far each has come, as its own directory tells, whichever run of the command left it."""

import math
from dataclasses import dataclass
from typing import Literal

from captioner import storage
from captioner.artifacts.manifests import MANIFEST, Record
from captioner.artifacts.output import WORK
from captioner.config import TuneConfig
from captioner.training.history import EpochRecord
from captioner.training.publish import history_so_far
from captioner.tuning.space import Hyperparameters

Status = Literal["finished", "stopped", "failed", "unfinished"]


@dataclass(frozen=True)
class Trial:
    """One training of a search."""

    number: int
    hyperparameters: Hyperparameters
    status: Status
    """finished, stopped (by ASHA), failed, or unfinished."""
    curve: list[tuple[int, float]]
    """(epoch, metric) in order."""
    seconds: float
    """Of training alone, validation left out."""
    error: str | None = None
    diverged: bool = False
    """Failed because of its loss: it would fail again."""

    def best(self, *, largest: bool) -> float:
        """The metric of its best epoch; nan if it has none."""
        values = [value for _, value in self.curve if math.isfinite(value)]
        return (max if largest else min)(values, default=math.nan)

    @property
    def over(self) -> bool:
        """Whether there is nothing left to do for it."""
        return self.status in ("finished", "stopped") or self.diverged


class Note(Record):
    """What happened to a trial, kept beside its directory; a published model says that itself."""

    status: Literal["stopped", "failed"]
    epochs: int | None = None
    """stopped: after so many. Its workers may have gone on for a moment."""
    error: str | None = None
    diverged: bool = False


def metric_of(config: TuneConfig) -> tuple[str, Literal["min", "max"]]:
    """What trials are judged by, as in their histories, and which of its values is best."""
    return ("validation_cider", "max") if config.metric == "cider" else ("validation_loss", "min")


def trial_uri(root: str, number: int) -> str:
    """The directory of a trial's training, in that of its search."""
    return storage.join(root, WORK, "trials", f"{number:03d}")


def write_note(root: str, number: int, note: Note) -> None:
    """
    Raises:
        StoreError: it cannot be written.
    """
    storage.write_bytes(_note_uri(root, number), note.model_dump_json().encode())


def read_trial(
    config: TuneConfig, root: str, number: int, hyperparameters: Hyperparameters
) -> tuple[Trial, list[EpochRecord]]:
    """A trial as it stands, and its epochs.

    Raises:
        StoreError: the search's directory cannot be read.
    """
    uri, place = trial_uri(root, number), _note_uri(root, number)
    history = history_so_far(uri)
    note = Note(status="failed")
    status: Status = "unfinished"
    if storage.exists(storage.join(uri, MANIFEST)):
        status = "finished"
    elif storage.exists(place):
        note = Note.model_validate(storage.read_json(place))
        status, history = note.status, history[: note.epochs]
    metric, _ = metric_of(config)
    trial = Trial(
        number,
        hyperparameters,
        status,
        [(record.epoch, getattr(record, metric)) for record in history],
        sum(record.seconds for record in history),
        note.error,
        note.diverged,
    )
    return trial, history


def _note_uri(root: str, number: int) -> str:
    return f"{trial_uri(root, number)}.json"
