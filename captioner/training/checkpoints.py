"""Where a training run keeps its checkpoints, and the last of them, whichever run of the command wrote it."""

import logging
from dataclasses import dataclass
from pathlib import Path

from ray.train import Checkpoint

from captioner import storage
from captioner.artifacts.output import WORK
from captioner.errors import StoreError
from captioner.runtime.ray_private import CHECKPOINTS, latest_checkpoint
from captioner.training.history import EpochRecord, read_history
from captioner.training.state import BEST, HISTORY, LAST

logger = logging.getLogger(__name__)

RUN = "run"


def last_checkpoint(root: str) -> Checkpoint | None:
    """The last whole checkpoint of an unfinished run, if there is one.

    Ray Train's list of them is written in place: of a run that was killed meanwhile it is no JSON, and Ray would refuse
    every further one. It is deleted then, and the run begins anew.

    Args:
        root: the model's directory.

    Raises:
        StoreError: the directory cannot be read.
    """
    place = storage.join(root, WORK, RUN)
    listed = storage.join(place, CHECKPOINTS)
    if not storage.exists(listed):
        return None
    filesystem, path = storage.resolve(place)
    try:
        name = latest_checkpoint(storage.read_bytes(listed))
    except ValueError:
        logger.warning("%s: its list of checkpoints was cut short, so it begins anew", root)
        filesystem.delete_file(f"{path}/{CHECKPOINTS}")
        return None
    return None if name is None else Checkpoint(f"{path}/{name}", filesystem)


def read(checkpoint: Checkpoint, name: str) -> bytes:
    """One file of a checkpoint.

    Raises:
        StoreError: it cannot be read.
    """
    try:
        with checkpoint.filesystem.open_input_file(str(Path(checkpoint.path) / name)) as file:
            data: bytes = file.read()
    except OSError as error:
        raise StoreError(f"cannot read {checkpoint.path}/{name}: {error}") from error
    return data


@dataclass(frozen=True)
class Learnt:
    """What a run has learnt by the end of an epoch."""

    best: bytes
    """Weights of the best epoch."""
    last: bytes
    """Weights after the last step, not their EMA."""
    history: list[EpochRecord]

    @classmethod
    def read(cls, checkpoint: Checkpoint) -> "Learnt":
        """
        Raises:
            StoreError: the checkpoint cannot be read.
        """
        history = read_history(read(checkpoint, HISTORY).decode())
        if not history:
            raise StoreError(f"{checkpoint.path} is of a run that has not ended an epoch")
        return cls(read(checkpoint, BEST), read(checkpoint, LAST), history)
