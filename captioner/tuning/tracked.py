"""A search in MLflow: a run of its own, and one below it for each trial."""

from collections.abc import Sequence

from captioner import storage
from captioner.artifacts.manifests import SearchManifest
from captioner.artifacts.output import Output
from captioner.training.history import EpochRecord
from captioner.training.tracking import Tracker
from captioner.tuning.publish import MODEL, PICTURE
from captioner.tuning.space import Hyperparameters
from captioner.tuning.trials import Trial, trial_uri

SEARCH = "search"
_STATUSES = {"failed": "FAILED", "unfinished": "KILLED"}


def follow(root: str, drawn: Sequence[Hyperparameters], tracker: Tracker) -> None:
    """Tell of the epochs of every trial that has begun."""
    for number, hyperparameters in enumerate(drawn):
        if tracker.follows and storage.exists(trial_uri(root, number)):
            tracker.begin(_key(number), _key(number), hyperparameters, parent=SEARCH)
            tracker.follow(_key(number), trial_uri(root, number))


def end(
    output: Output,
    manifest: SearchManifest,
    trials: Sequence[tuple[Trial, list[EpochRecord]]],
    tracker: Tracker,
) -> None:
    """End the runs of the trials and of the search, whose directory is filled."""
    largest = manifest.metric == "validation_cider"
    for trial, _ in trials:
        tags = {"status": trial.status, "best": str(trial.number == manifest.best)}
        scores = {f"best_{manifest.metric}": trial.best(largest=largest)} if trial.curve else {}
        status = _STATUSES.get(trial.status, "FINISHED")
        tracker.end(_key(trial.number), status, scores=scores, tags=tags)
    best = trials[manifest.best][0]
    tracker.end(
        SEARCH,
        scores={f"best_{manifest.metric}": best.best(largest=largest)},
        tags={"model": output.uri(MODEL), "best": _key(manifest.best)},
        pictures={PICTURE: storage.read_bytes(output.uri(PICTURE))} if tracker.follows else {},
    )


def _key(number: int) -> str:
    return f"trial-{number:03d}"
