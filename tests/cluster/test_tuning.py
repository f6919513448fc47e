"""Whole searches on a real local Ray: ASHA stops trials, crashes are recorded, a killed search goes on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from captioner.artifacts.model_directory import load_model
from captioner.artifacts.output import WORK
from captioner.config import TuneConfig
from captioner.errors import StoreError
from captioner.tuning import search
from captioner.tuning.search import SearchResult, run_search
from tests import odd
from tests.stores import write_store

ROOT = Path(__file__).resolve().parents[2]
EPOCHS = 3

pytestmark = [
    pytest.mark.long,
    pytest.mark.usefixtures("local_ray"),
    pytest.mark.timeout(900),
]


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_store(
        tmp_path_factory.mktemp("store") / "features", {"train": 20, "validation": 5}
    )


def settings(features: str, output: Path, **changes: Any) -> TuneConfig:
    base: dict[str, Any] = {
        "features": features,
        "output": str(output),
        "space": "wide",
        "num_samples": 4,
        "max_epochs": EPOCHS,
        "reduction_factor": 2,
    }
    return TuneConfig.model_validate(base | changes)


@pytest.fixture(scope="module")
def found(features: str, tmp_path_factory: pytest.TempPathFactory) -> SearchResult:
    """An undisturbed search, one of whose trials crashes."""
    patch = pytest.MonkeyPatch()
    drawn = search.draw_trials

    def with_a_bad_one(config: TuneConfig, *, grid: bool) -> list[dict[str, Any]]:
        trials = drawn(config, grid=grid)
        # Adam at this rate leaves float32 within an epoch, and at that one learns nothing.
        trials[1] |= {"learning_rate": 1e30, "decoder": "merge", "optimizer": "adam"}
        trials[3] |= {"learning_rate": 1e-7, "optimizer": "adam"}
        return trials

    patch.setattr(search, "draw_trials", with_a_bad_one)
    try:
        # The first trial is over when the last starts: of those that run at once, chance decides which come to a rung
        # first and so are kept.
        output = tmp_path_factory.mktemp("search") / odd.NAME
        return run_search(settings(features, output, max_concurrent=2))
    finally:
        patch.undo()


def test_best_trial_is_published_as_a_model(found: SearchResult) -> None:
    model = load_model(f"{found.uri}/model")
    best = found.trials[found.best]
    assert best.status == "finished"
    assert model.record.decoder.kind == best.hyperparameters["decoder"]
    finished = [trial for trial in found.trials if trial.status == "finished"]
    assert best.best(largest=False) == min(trial.best(largest=False) for trial in finished)
    assert (
        model.record.training["optimizer"]["learning_rate"] == best.hyperparameters["learning_rate"]
    )


def test_record_holds_every_trial_and_its_status(found: SearchResult) -> None:
    rows = pq.read_table(f"{found.uri}/trials.parquet").to_pylist()
    assert [row["trial"] for row in rows] == [0, 1, 2, 3]
    assert rows[1]["status"] == "failed"
    assert "loss is" in rows[1]["error"]
    for row in rows:
        assert row["status"] in ("finished", "stopped", "failed")
        assert (row["epochs"] == EPOCHS) == (row["status"] == "finished")
    assert Path(found.uri, "trials.png").read_bytes().startswith(b"\x89PNG")
    assert f"{found.best}*" in found.table()


def test_asha_stops_trials_that_fall_behind(found: SearchResult) -> None:
    stopped = [trial for trial in found.trials if trial.status == "stopped"]
    assert stopped
    best = found.trials[found.best].curve[0][1]
    for trial in stopped:
        assert len(trial.curve) < EPOCHS
        assert trial.curve[0][1] >= best


def test_tensorboard_has_a_run_for_every_trial_with_its_hyperparameters(
    found: SearchResult,
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    runs = sorted(Path(found.uri, "tensorboard").iterdir())
    assert [run.name for run in runs if run.is_dir()] == [f"trial-00{n}" for n in range(4)]
    events = EventAccumulator(str(runs[found.best]))
    events.Reload()
    assert any("validation_loss" in tag for tag in events.Tags()["scalars"])
    assert "_hparams_/session_start_info" in events.summary_metadata


def test_complete_search_is_left_alone_and_another_refused(
    found: SearchResult, features: str
) -> None:
    config = settings(features, Path(found.uri))
    assert run_search(config) == found
    with pytest.raises(StoreError, match="search.max_epochs: 3 there, 4 asked"):
        run_search(config.model_copy(update={"max_epochs": 4}))


@pytest.mark.chaos
def test_killed_search_goes_on_with_the_same_trials(features: str, tmp_path: Path) -> None:
    config = settings(
        features, tmp_path / odd.NAME, scheduler="none", max_epochs=2, max_concurrent=2
    )
    program = (
        "import sys; from captioner.config import TuneConfig; from captioner.tuning.search import run_search;"
        "run_search(TuneConfig.model_validate_json(sys.argv[1]))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    driver = subprocess.Popen(
        [sys.executable, "-c", program, config.model_dump_json()],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    trials = tmp_path / odd.NAME / WORK / "trials"
    deadline = time.monotonic() + 600
    while not list(trials.glob("*/manifest.json")):
        assert driver.poll() is None, "the search ended before it could be killed"
        assert time.monotonic() < deadline, "no trial finished"
        time.sleep(0.1)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    kept = {path.parent.name: path.stat().st_mtime_ns for path in trials.glob("*/manifest.json")}
    assert 0 < len(kept) < 4
    result = run_search(config)
    assert [trial.number for trial in result.trials] == list(range(4))
    assert {trial.status for trial in result.trials} == {"finished"}
    assert [[epoch for epoch, _ in trial.curve] for trial in result.trials] == [[1, 2]] * 4
