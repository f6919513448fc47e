"""Ray Tune over ``run_training``: trials at a time, ASHA, retries, continuing after a kill."""

import logging
import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ray import tune

from captioner import storage
from captioner.artifacts.feature_store import FeatureStore
from captioner.artifacts.manifests import SearchManifest
from captioner.artifacts.output import Output, publish_once
from captioner.config import TuneConfig
from captioner.decoders import decoder_class
from captioner.errors import ConfigError, OutOfReachError, TrainingError
from captioner.runtime.cluster import (
    driver_resource,
    num_cpus,
    num_gpus,
    start_ray,
    worker_slots,
)
from captioner.runtime.failures import cause
from captioner.runtime.progress import Ticker
from captioner.training.fit import error_of_ours
from captioner.training.history import EpochRecord
from captioner.training.publish import history_so_far
from captioner.training.run import run_training
from captioner.training.tracking import FOLLOW_SECONDS, Tracker
from captioner.tuning.asha import RememberingASHA
from captioner.tuning.callbacks import EpochLines, ReportEpochs
from captioner.tuning.clock import Clock
from captioner.tuning.publish import SearchResult, publish_search, read_search
from captioner.tuning.space import Hyperparameters, draw_trials, training_of
from captioner.tuning.tracked import SEARCH, end, follow
from captioner.tuning.trials import Note, Trial, metric_of, read_trial, trial_uri, write_note

logger = logging.getLogger(__name__)

# Of a trial's driver, its Train controller and its progress lines. It bounds the trials that a small node begins.
_MEMORY = 768 * 2**20
_TUNE = {
    # Tune's own handler of Ctrl-C returns the trials as they stand, and a half search would be published.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    # The newer output shows a box even where it is to be silent.
    "RAY_AIR_NEW_OUTPUT": "0",
}
# Where things lie and what works on them: a search may go on with others.
_NO_MATTER = {
    "features",
    "output",
    "max_concurrent",
    "workers_per_trial",
    "gpus_per_trial",
    "trial_retries",
    "track",
    "restart",
}
CLOCK = "seconds.json"
_SAVE_SECONDS = 20.0
# Before a trial that failed is tried again: what made it fail may pass.
_PAUSE_SECONDS = 10.0


def run_search(config: TuneConfig) -> SearchResult:
    """Try every trial of ``config.space`` and publish the best one's model, with the record of all.

    Continues a killed search: what is over is kept, all else goes on from its last checkpoint, and ASHA decides as it
    would have without the kill.

    Raises:
        StoreError: the features lack something, or the output belongs to another search.
        ConfigError: the cluster is too small for a trial.
        TrainingError: no trial ended an epoch, and none ever will.
        OutOfReachError: the cluster, the store or the output cannot be had now; the same command goes on later.
    """
    store = FeatureStore.open(config.features)
    config = config.model_copy(update={"features": store.uri})
    drawn = draw_trials(config, grid=store.manifest.grid)
    for parameters in drawn:
        decoder = training_of(config, parameters, "unused", threads=1).decoder
        for split in ("train", "validation"):
            store.require(split, decoder_class(decoder.kind).columns, captions=True)

    def fill(output: Output) -> SearchManifest:
        trials = _trials(config, output.root, drawn)
        clock = Clock(output.work(CLOCK))
        tracker = Tracker(config.track, output.work())
        tracker.begin(SEARCH, output.root.rpartition("/")[2], config.model_dump(mode="json"))
        if not all(trial.over for trial, _ in trials) and clock.left(config.time_budget) != 0:
            start_ray()
            with (
                Ticker(clock.save, _SAVE_SECONDS),
                tracker.ended_with(SEARCH),
                Ticker(lambda: follow(output.root, drawn, tracker), FOLLOW_SECONDS),
            ):
                lost = _run_trials(config, output.root, trials, clock.left(config.time_budget))
            trials = _trials(config, output.root, drawn, lost)
        manifest = publish_search(config, output, trials)
        end(output, manifest, trials, tracker)
        return manifest

    identity = {
        "job": "tune",
        "features": store.identity(),
        "search": config.model_dump(mode="json", exclude=_NO_MATTER),
    }
    manifest = publish_once(config.output, identity, SearchManifest, fill, restart=config.restart)
    return read_search(storage.absolute(config.output), manifest)


def _trials(
    config: TuneConfig,
    root: str,
    drawn: list[Hyperparameters],
    lost: Mapping[int, str] | None = None,
) -> list[tuple[Trial, list[EpochRecord]]]:
    """Every trial as it stands, and its epochs."""
    found = []
    for number, parameters in enumerate(drawn):
        trial, history = read_trial(config, root, number, parameters)
        if lost and number in lost and trial.status == "unfinished":
            trial = replace(trial, status="failed", error=lost[number])
        found.append((trial, history))
    return found


def _run_trials(
    config: TuneConfig,
    root: str,
    trials: list[tuple[Trial, list[EpochRecord]]],
    seconds: float | None,
) -> dict[int, str]:
    """Run what is not over yet, for so many seconds at most. Errors of the trials whose processes were lost, by
    number."""
    waiting = [trial for trial, _ in trials if not trial.over]
    concurrent = trials_at_a_time(config, len(waiting))
    threads = max(1, num_cpus() // (concurrent * config.workers_per_trial))
    logger.info(
        "%s%d trials, %d at a time",
        f"continuing the search with {len(waiting)} of " if len(waiting) < len(trials) else "",
        len(trials),
        concurrent,
    )
    metric, mode = metric_of(config)
    scheduler = None
    if config.scheduler == "asha":
        scheduler = RememberingASHA(
            config,
            metric,
            mode,
            # Of a trial that goes on the last epoch is still to be judged: it is reported again.
            {trial.number: trial.curve[: None if trial.over else -1] for trial, _ in trials},
            lambda number, epochs: write_note(root, number, Note(status="stopped", epochs=epochs)),
        )
    # What Tune writes is not needed again: the trials' own directories tell how far the search has come, and no file
    # of Tune's, pickles among them, is ever read.
    with tempfile.TemporaryDirectory(prefix="captioner-search-") as folder:
        os.environ.update(_TUNE)
        tuner = tune.Tuner(
            tune.with_resources(
                _trainable(config, root, threads=threads),
                # Beside this driver, without which the search is lost anyhow: another node's loss takes workers, which
                # Ray Train replaces.
                {"memory": _MEMORY, driver_resource(): 0.001},
            ),
            param_space={
                "trial": tune.grid_search(
                    [{"number": trial.number, **trial.hyperparameters} for trial in waiting]
                )
            },
            tune_config=tune.TuneConfig(
                scheduler=scheduler,
                max_concurrent_trials=concurrent,
                time_budget_s=seconds,
                trial_name_creator=_name,
                trial_dirname_creator=_name,
            ),
            run_config=tune.RunConfig(
                name="search",
                storage_path=folder,
                failure_config=tune.FailureConfig(max_failures=config.trial_retries),
                callbacks=[EpochLines(config, metric, len(waiting))],
                verbose=0,
            ),
        )
        try:
            results = tuner.fit()
        except tune.TuneError as error:
            # Raised where a trial's result is dealt with: its note could not be written.
            raise error_of_ours(error) from error
    return {
        int(str(result.path).rpartition("-")[2]): cause(result.error)
        for result in results
        if result.error is not None
    }


def trials_at_a_time(config: TuneConfig, trials: int) -> int:
    """How many of ``trials`` the cluster as it stands has room for at once.

    Raises:
        OutOfReachError: it has no room for a worker yet.
        ConfigError: it has none for the workers of one trial.
    """
    noun, workers = "GPU" if num_gpus() else "CPU", worker_slots(config.gpus_per_trial)
    if not workers:
        raise OutOfReachError(
            f"the Ray cluster has no {noun} for a trial yet: an autoscaling cluster must keep a worker up"
        )
    slots = workers // config.workers_per_trial
    if not slots:
        raise ConfigError(
            f"workers-per-trial: {config.workers_per_trial} need as many {noun}s, the cluster has {workers}"
        )
    return min(config.max_concurrent or slots, slots, trials)


def _trainable(config: TuneConfig, root: str, *, threads: int) -> Any:
    def train_trial(parameters: dict[str, Any]) -> None:
        trial = dict(parameters["trial"])
        number = trial.pop("number")
        uri = trial_uri(root, number)
        try:
            if history := history_so_far(uri):
                # Judged before it trains any further, as it would have been, had the search not been killed then.
                tune.report(history[-1].model_dump(exclude_none=True))
            training = training_of(config, trial, uri, threads=threads)
            run_training(training, callbacks=[ReportEpochs()])
        except Exception as error:
            diverged = isinstance(error, TrainingError)
            write_note(root, number, Note(status="failed", error=cause(error), diverged=diverged))
            if not diverged:
                time.sleep(_PAUSE_SECONDS)
                raise

    return train_trial


def _name(trial: Any) -> str:
    return f"trial-{trial.config['trial']['number']:03d}"
