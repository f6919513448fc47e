"""Ray Train's part of a training: workers that learn, restarted from checkpoints, watched and followed."""

import logging
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ray.train import (
    CheckpointConfig,
    FailureConfig,
    LoggingConfig,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
    UserCallback,
)
from ray.train.torch import TorchTrainer

from captioner import storage
from captioner.artifacts.manifests import FileEntry
from captioner.artifacts.output import Output
from captioner.config import LearningConfig
from captioner.errors import CaptionerError, ConfigError, TrainingError
from captioner.runtime.cluster import ACTOR_CPUS, num_gpus, worker_slots
from captioner.runtime.progress import MessageLog, Ticker
from captioner.runtime.ray_private import start_autoscaling_coordinator
from captioner.training.checkpoints import RUN, Learnt, last_checkpoint
from captioner.training.history import best_epoch
from captioner.training.tracking import FOLLOW_SECONDS, Tracker

logger = logging.getLogger(__name__)

# Key of the run in MLflow.
_RUN = "run"


@dataclass(frozen=True)
class Work:
    """What the workers of a run do."""

    function: Callable[[dict[str, Any]], str | None]
    arguments: Mapping[str, Any]
    """Its own, beside ``messages``."""
    fed: bool = False
    """Whether tasks on the cluster's CPUs feed them: they leave those to the tasks then."""


def learn(
    config: LearningConfig,
    output: Output,
    work: Work,
    write: Callable[[Learnt], list[FileEntry]],
    callbacks: Sequence[UserCallback] = (),
) -> list[FileEntry]:
    """Let workers learn, in MLflow's sight where that is asked for, and write what they have learnt.

    Continues a killed run from its last checkpoint.

    Returns:
        what ``write`` returns.

    Raises:
        ConfigError: the cluster is too small for ``num_workers``.
        TrainingError: the loss stopped being finite.
    """
    start_autoscaling_coordinator()
    tracker = Tracker(config.track, output.work())
    tracker.begin(_RUN, output.root.rpartition("/")[2], config.model_dump(mode="json"))
    with (
        tracker.ended_with(_RUN),
        Ticker(lambda: tracker.follow(_RUN, output.root), FOLLOW_SECONDS),
    ):
        learnt = _fit(config, output, work, callbacks)
    files = write(learnt)
    if tracker.follows:
        best = best_epoch(learnt.history).model_dump(exclude={"epoch"}, exclude_none=True)
        tracker.end(
            _RUN,
            scores={f"best_{name}": value for name, value in best.items()},
            tags={"model": output.root},
            pictures={"curves.png": storage.read_bytes(output.uri("curves.png"))},
        )
    return files


def _fit(
    config: LearningConfig, output: Output, work: Work, callbacks: Sequence[UserCallback]
) -> Learnt:
    gpu, slots = num_gpus() > 0, worker_slots(config.gpus_per_worker)
    if slots < config.worker_range[0]:
        raise ConfigError(
            f"num-workers: {config.worker_range[0]} need as many {'GPUs' if gpu else 'CPUs'}, "
            f"the cluster has {slots}"
        )
    last_checkpoint(output.root)  # a damaged list of them would refuse the run
    filesystem, path = storage.resolve(output.work())
    with MessageLog(logger) as messages:
        trainer = TorchTrainer(
            work.function,
            train_loop_config={**work.arguments, "messages": messages.actor},
            scaling_config=ScalingConfig(
                num_workers=config.num_workers,
                use_gpu=gpu,
                resources_per_worker={
                    "CPU": ACTOR_CPUS if work.fed else 1,
                    **({"GPU": config.gpus_per_worker} if gpu else {}),
                },
                # Workers that hold next to nothing would all be packed on one node.
                placement_strategy="SPREAD" if work.fed and not gpu else "PACK",
            ),
            run_config=RunConfig(
                # A second fit() under the same name and path continues from the last checkpoint.
                name=RUN,
                storage_path=path,
                storage_filesystem=filesystem,
                failure_config=FailureConfig(max_failures=config.max_failures),
                checkpoint_config=CheckpointConfig(num_to_keep=2),
                callbacks=list(callbacks),
                logging_config=LoggingConfig(log_level="WARNING"),
            ),
        )
        try:
            with plain_interrupts():
                result = trainer.fit()
        except TrainingFailedError as failure:
            raise error_of_ours(failure) from failure
    if result.return_value is not None:
        kept = f"; the epoch before is kept in {output.work()}" if result.checkpoint else ""
        raise TrainingError(f"{result.return_value}{kept}")
    return Learnt.read(result.checkpoint)


@contextmanager
def plain_interrupts() -> Iterator[None]:
    """Ctrl-C ends a training as a ``KeyboardInterrupt``.

    Ray Train's handler stops the workers and then exits with status 0, as if all were done; and it stays in place when
    the training is over.
    """
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as stop:
        raise KeyboardInterrupt from stop
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)


def error_of_ours(failure: Exception) -> Exception:
    """The error of ours behind a failed run or search, if there is one."""
    # Only failures of workers carry them; a failed controller or a preempted node has none.
    for failed in [failure, *getattr(failure, "worker_failures", {}).values()]:
        error: BaseException | None = failed
        while error is not None:
            if isinstance(error, CaptionerError):
                return error
            error = error.__cause__ or error.__context__
    return failure
