"""What a search publishes: the best trial's model, the table and the picture of all, a TensorBoard run of each."""

import io
import json
import math
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq
from torch.utils.tensorboard.summary import hparams

from captioner import storage
from captioner.artifacts.manifests import (
    MANIFEST,
    FileEntry,
    ModelManifest,
    SearchManifest,
    open_manifest,
)
from captioner.artifacts.model_directory import load_model
from captioner.artifacts.output import CLAIM, Output
from captioner.artifacts.tensorboard import event_file
from captioner.config import TuneConfig
from captioner.errors import OutOfReachError, TrainingError
from captioner.plots import plot_trials
from captioner.training.history import EpochRecord
from captioner.training.publish import add_epochs
from captioner.training.run import publish_as_it_stands
from captioner.tuning.space import training_of
from captioner.tuning.trials import Trial, metric_of, trial_uri

MODEL, TRIALS, PICTURE = "model", "trials.parquet", "trials.png"
# Of a terminal, in characters.
_WIDTH = 80
_LET_GO_SECONDS = 60.0


@dataclass(frozen=True)
class SearchResult:
    """A finished search."""

    uri: str
    metric: str
    best: int
    trials: list[Trial]

    def table(self) -> str:
        """The trials, best first, for a terminal of 80 columns: each in a line and, below, what sets it apart."""
        largest = self.metric == "validation_cider"
        order = sorted(
            self.trials,
            key=lambda trial: (
                math.isnan(value := trial.best(largest=largest)),
                -value if largest else value,
            ),
        )
        differing = [
            name
            for name in self.trials[0].hyperparameters
            if len({trial.hyperparameters[name] for trial in self.trials}) > 1
        ]
        lines = [f"trial   status      epochs  {self.metric:>16}  seconds"]
        for trial in order:
            chosen = "*" if trial.number == self.best else ""
            lines.append(
                f"{f'{trial.number}{chosen}':<6}  {trial.status:<10}  {len(trial.curve):>6}  "
                f"{trial.best(largest=largest):>16.4f}  {trial.seconds:>7.0f}"
            )
            values = (f"{name} {trial.hyperparameters[name]}" for name in differing)
            said = ", ".join(values) + (f"; {trial.error}" if trial.error else "")
            lines += textwrap.wrap(
                said, _WIDTH, initial_indent="        ", subsequent_indent="        "
            )
        epochs = sum(len(trial.curve) for trial in self.trials)
        return "\n".join([*lines, "", f"{epochs} epochs in all; model: {self.uri}/{MODEL}"])


def publish_search(
    config: TuneConfig, output: Output, trials: Sequence[tuple[Trial, list[EpochRecord]]]
) -> SearchManifest:
    """Write everything of a search but its manifest.

    The best is that of the trials which came to their end, or to the end of the time; where none did, that of all. One
    that has epochs left is published as it stands.

    Raises:
        TrainingError: no trial has ended an epoch, and none ever will.
        OutOfReachError: no trial has ended an epoch, but may yet.
    """
    metric, mode = metric_of(config)
    largest = mode == "max"
    known = [trial for trial, _ in trials]
    told = [trial for trial in known if not math.isnan(trial.best(largest=largest))]
    candidates = [trial for trial in told if trial.status in ("finished", "unfinished")] or told
    if not candidates:
        errors = "; ".join(sorted({trial.error for trial in known if trial.error})) or "no error"
        if all(trial.diverged for trial in known):
            raise TrainingError(f"no trial ended an epoch: {errors}")
        raise OutOfReachError(
            f"no trial has ended an epoch yet: {errors}: the same command tries again"
        )
    best = (max if largest else min)(candidates, key=lambda trial: trial.best(largest=largest))
    model = trial_uri(output.root, best.number)
    if best.status != "finished":
        _let_go(
            lambda: publish_as_it_stands(
                training_of(config, best.hyperparameters, model, threads=1)
            )
        )
    # The copy becomes a model with its manifest, as everywhere the last file.
    paths = [entry.path for entry in open_manifest(model, ModelManifest).files]
    files = [
        output.write(f"{MODEL}/{path}", storage.read_bytes(storage.join(model, path)))
        for path in (*paths, CLAIM, MANIFEST)
    ]
    load_model(output.uri(MODEL))
    for trial, history in trials:
        _write_tensorboard(output, trial, history, metric, trial.best(largest=largest), files)
    table = io.BytesIO()
    pq.write_table(_table(known, metric, largest), table)
    files += [
        output.write(TRIALS, table.getvalue()),
        output.write(PICTURE, plot_trials(known, best.number, metric, largest=largest)),
    ]
    return SearchManifest(best=best.number, metric=metric, trials=len(known), files=files)


def _let_go(publish: Callable[[], object]) -> None:
    """Publish a trial that was stopped, whose process may need a moment to end."""
    deadline = time.monotonic() + _LET_GO_SECONDS
    while True:
        try:
            publish()
            return
        except OutOfReachError:
            if time.monotonic() > deadline:
                raise
        time.sleep(1)


def read_search(root: str, manifest: SearchManifest) -> SearchResult:
    """A published search.

    Raises:
        StoreError: its table cannot be read.
    """
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


def _write_tensorboard(
    output: Output,
    trial: Trial,
    history: list[EpochRecord],
    metric: str,
    best: float,
    files: list[FileEntry],
) -> None:
    with event_file(output, "search", files, run=f"trial-{trial.number:03d}") as writer:
        add_epochs(writer, history)
        figures = {f"best/{metric}": best}
        for summary in hparams(dict(trial.hyperparameters), figures):  # type: ignore[no-untyped-call]
            writer._get_file_writer().add_summary(summary)  # type: ignore[no-untyped-call]
        writer.add_scalar(f"best/{metric}", best, len(history))


def _table(trials: Sequence[Trial], metric: str, largest: bool) -> pa.Table:
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
