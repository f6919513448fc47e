"""Ray Tune over ``run_training``: trials, ASHA, resuming, and what a search publishes."""

import io
import json
import logging
import math
import os
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler

from captioner import storage
from captioner.artifacts.feature_store import FeatureStore
from captioner.artifacts.manifests import MANIFEST, ModelManifest, SearchManifest, open_manifest
from captioner.artifacts.model_directory import load_model
from captioner.artifacts.output import CLAIM, WORK, Output, publish_once
from captioner.config import TuneConfig
from captioner.decoders import decoder_class
from captioner.errors import TrainingError
from captioner.plots import plot_trials
from captioner.runtime.cluster import num_cpus, num_gpus, start_ray
from captioner.runtime.ray_private import HEAD
from captioner.training.run import run_training
from captioner.tuning.space import Hyperparameters, draw_trials, training_of

logger = logging.getLogger(__name__)

SEARCH = "search"
MODEL, TRIALS, PICTURE = "model", "trials.parquet", "trials.png"

# A trial's driver, its Train controller and its progress lines live on the head, without which the search is lost
# anyhow: another node's loss takes workers, which Ray Train replaces. Memory bounds the trials a small head begins.
_DRIVER = {"memory": 768 * 2**20, HEAD: 0.001}


@dataclass(frozen=True)
class Trial:
    """One training of a search."""

    number: int
    hyperparameters: Hyperparameters
    status: str
    """finished, stopped (by ASHA), or failed."""
    curve: list[tuple[int, float]]
    """(epoch, metric) in order."""
    seconds: float
    error: str | None

    def best(self, *, largest: bool) -> float:
        """The metric of its best epoch; nan if it has none."""
        values = [value for _, value in self.curve if math.isfinite(value)]
        return (max if largest else min)(values, default=math.nan)


@dataclass(frozen=True)
class SearchResult:
    """A finished search."""

    uri: str
    metric: str
    best: int
    trials: list[Trial]

    def table(self) -> str:
        """The trials, best first, for a terminal."""
        largest = self.metric == "validation_cider"
        order = sorted(
            self.trials,
            key=lambda trial: (
                math.isnan(value := trial.best(largest=largest)),
                -value if largest else value,
            ),
        )
        names = sorted({name for trial in self.trials for name in trial.hyperparameters})
        rows = [["trial", "status", "epochs", self.metric, "seconds", *names]]
        for trial in order:
            chosen = "*" if trial.number == self.best else ""
            rows.append(
                [
                    f"{trial.number}{chosen}",
                    trial.status,
                    str(len(trial.curve)),
                    f"{trial.best(largest=largest):.4f}",
                    f"{trial.seconds:.0f}",
                    *(str(trial.hyperparameters.get(name, "")) for name in names),
                ]
            )
        wide = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [
            "  ".join(f"{cell:>{w}}" for cell, w in zip(row, wide, strict=True)) for row in rows
        ]
        epochs = sum(len(trial.curve) for trial in self.trials)
        return "\n".join([*lines, "", f"{epochs} epochs in all; model: {self.uri}/{MODEL}"])


def run_search(config: TuneConfig) -> SearchResult:
    """Try every trial of ``config.space`` and publish the best one's model, with the record of all.

    Continues a killed search: finished trials are kept, unfinished ones go on from their last epoch.

    Raises:
        StoreError: the features lack something, or the output belongs to another search.
        TrainingError: no trial came to its end.
    """
    store = FeatureStore.open(config.features)
    config = config.model_copy(update={"features": store.uri})
    trials = draw_trials(config, grid=store.manifest.grid)
    for trial in trials:
        decoder = training_of(config, trial, "unused", threads=1).decoder
        for split in ("train", "validation"):
            store.require(split, decoder_class(decoder.kind).columns, captions=True)

    def fill(output: Output) -> SearchManifest:
        # Tune's newer output has its own columns and ignores the reporter that names ours.
        os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
        # Tune's own handler of Ctrl-C returns the trials as they stand, and a half search would be published.
        os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
        start_ray()
        return _write(config, output, _run_trials(config, trials, output))

    identity = {
        "job": "tune",
        "features": store.identity(),
        "search": config.model_dump(
            mode="json",
            exclude={"features", "output", "max_concurrent", "gpus_per_trial", "restart"},
        ),
    }
    manifest = publish_once(config.output, identity, SearchManifest, fill, restart=config.restart)
    return _published(storage.absolute(config.output), manifest)


def _run_trials(config: TuneConfig, trials: list[Hyperparameters], output: Output) -> list[Trial]:
    slots = int(num_gpus() / config.gpus_per_trial) if num_gpus() else num_cpus()
    concurrent = min(config.max_concurrent or slots, slots, len(trials))
    trainable = _trainable(config, output.root, threads=max(1, num_cpus() // concurrent))
    metric, mode = _metric(config)
    logger.info("%d trials, %d at a time", len(trials), concurrent)
    filesystem, path = storage.resolve(output.work())
    place = f"{path}/{SEARCH}"
    if tune.Tuner.can_restore(place, storage_filesystem=filesystem):
        logger.info("continuing the search")
        tuner = tune.Tuner.restore(
            place, trainable, resume_unfinished=True, storage_filesystem=filesystem
        )
    else:
        scheduler = None
        if config.scheduler == "asha":
            scheduler = ASHAScheduler(
                time_attr="epoch",
                # One more than a trial ever reports: it ends by itself, with its model published.
                max_t=config.max_epochs + 1,
                grace_period=min(config.grace_epochs, config.max_epochs),
                reduction_factor=config.reduction_factor,
            )
        tuner = tune.Tuner(
            trainable,
            param_space={
                "trial": tune.grid_search(
                    [{"number": number, **trial} for number, trial in enumerate(trials)]
                )
            },
            tune_config=tune.TuneConfig(
                metric=metric,
                mode=mode,
                scheduler=scheduler,
                max_concurrent_trials=concurrent,
                trial_name_creator=_name,
                trial_dirname_creator=_name,
            ),
            run_config=tune.RunConfig(
                name=SEARCH,
                storage_path=path,
                storage_filesystem=filesystem,
                progress_reporter=tune.CLIReporter(
                    metric_columns={"epoch": "epoch", metric: metric},
                    parameter_columns={f"trial/{name}": name for name in trials[0]},
                    max_report_frequency=10,
                    max_progress_rows=len(trials),
                ),
            ),
        )
    results = tuner.fit()
    found = []
    for result in results:
        parameters = dict(result.config["trial"])
        number = int(parameters.pop("number"))
        frame = result.metrics_dataframe
        curve: list[tuple[int, float]] = []
        done = storage.exists(storage.join(_trial_uri(output.root, number), MANIFEST))
        if done:
            # The model's own history is whole, even where a kill swallowed some of Tune's reports.
            with storage.open_input(
                storage.join(_trial_uri(output.root, number), "history.parquet")
            ) as file:
                rows = pq.read_table(file, columns=["epoch", metric]).to_pylist()
            curve = [(row["epoch"], row[metric]) for row in rows]
        elif frame is not None and metric in frame:
            last = frame.drop_duplicates("epoch", keep="last").sort_values("epoch")
            curve = [
                (int(epoch), float(value))
                for epoch, value in zip(last["epoch"], last[metric], strict=True)
            ]
        status = "finished" if done else "failed" if result.error else "stopped"
        seconds = float(frame["time_this_iter_s"].sum()) if curve else 0.0
        error = None if result.error is None else " ".join(str(result.error).split())[-300:]
        found.append(Trial(number, parameters, status, curve, seconds, None if done else error))
    return sorted(found, key=lambda trial: trial.number)


def _trainable(config: TuneConfig, root: str, *, threads: int) -> Any:
    def train_trial(parameters: dict[str, Any]) -> None:
        trial = dict(parameters["trial"])
        training = training_of(
            config, trial, _trial_uri(root, trial.pop("number")), threads=threads
        )
        result = run_training(training, callbacks=[TuneReportCallback()])
        # A trial that had come to its last epoch before the search was killed reports nothing else.
        tune.report(result.history[-1].model_dump(exclude_none=True))

    return tune.with_resources(train_trial, _DRIVER)


def _trial_uri(root: str, number: int) -> str:
    return storage.join(root, WORK, "trials", f"{number:03d}")


def _name(trial: Any) -> str:
    return f"trial-{trial.config['trial']['number']:03d}"


def _metric(config: TuneConfig) -> tuple[str, str]:
    return ("validation_cider", "max") if config.metric == "cider" else ("validation_loss", "min")


def _write(config: TuneConfig, output: Output, trials: list[Trial]) -> SearchManifest:
    metric, mode = _metric(config)
    largest = mode == "max"
    finished = [trial for trial in trials if trial.status == "finished"]
    if not finished:
        errors = {trial.error for trial in trials if trial.error}
        raise TrainingError(f"no trial came to its end; {' '.join(sorted(errors)) or 'no error'}")
    best = (max if largest else min)(finished, key=lambda trial: trial.best(largest=largest))
    model = _trial_uri(output.root, best.number)
    # The copy becomes a model with its manifest, as everywhere the last file.
    paths = [entry.path for entry in open_manifest(model, ModelManifest).files]
    files = [
        output.write(f"{MODEL}/{path}", storage.read_bytes(storage.join(model, path)))
        for path in (*paths, CLAIM, MANIFEST)
    ]
    load_model(output.uri(MODEL))
    for file in storage.list_files(output.work(SEARCH)):
        if "events.out.tfevents" in file.path:
            files.append(output.write(f"tensorboard/{file.path}", storage.read_bytes(file.uri)))
    table = io.BytesIO()
    pq.write_table(_table(trials, metric, largest), table)
    files += [
        output.write(TRIALS, table.getvalue()),
        output.write(PICTURE, plot_trials(trials, best.number, metric, largest=largest)),
    ]
    return SearchManifest(best=best.number, metric=metric, trials=len(trials), files=files)


def _table(trials: list[Trial], metric: str, largest: bool) -> pa.Table:
    return pa.Table.from_pylist(
        [
            {
                "trial": trial.number,
                "status": trial.status,
                "epochs": len(trial.curve),
                metric: trial.best(largest=largest),
                "seconds": trial.seconds,
                "error": trial.error,
                "configuration": json.dumps(trial.hyperparameters),
                "curve": [{"epoch": epoch, "value": value} for epoch, value in trial.curve],
            }
            for trial in trials
        ],
        pa.schema(
            [
                ("trial", pa.int64()),
                ("status", pa.string()),
                ("epochs", pa.int64()),
                (metric, pa.float64()),
                ("seconds", pa.float64()),
                ("error", pa.string()),
                ("configuration", pa.string()),
                ("curve", pa.list_(pa.struct([("epoch", pa.int64()), ("value", pa.float64())]))),
            ]
        ),
    )


def _published(root: str, manifest: SearchManifest) -> SearchResult:
    uri = storage.join(root, TRIALS)
    with storage.reading(uri), storage.open_input(uri) as file:
        rows = pq.read_table(file).to_pylist()
    trials = [
        Trial(
            row["trial"],
            json.loads(row["configuration"]),
            row["status"],
            [(point["epoch"], point["value"]) for point in row["curve"]],
            row["seconds"],
            row["error"],
        )
        for row in rows
    ]
    return SearchResult(root, manifest.metric, manifest.best, trials)
