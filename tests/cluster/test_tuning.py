"""Whole searches on a real local Ray: ASHA stops trials, crashes are recorded, a killed search goes on."""

import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from captioner.artifacts.model_directory import load_model
from captioner.artifacts.output import WORK
from captioner.config import TuneConfig
from captioner.errors import OutOfReachError, StoreError
from captioner.runtime.ray_private import CHECKPOINTS, latest_checkpoint
from captioner.tuning import search
from captioner.tuning.publish import SearchResult
from captioner.tuning.search import run_search
from captioner.tuning.trials import Note, write_note
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


DRIVER = """
import os, sys
from captioner.config import TuneConfig
from captioner.errors import CaptionerError
from captioner.tuning import search
from tests.cluster.test_tuning import with_a_diverging_one

search._PAUSE_SECONDS = 0.0
search.draw_trials = with_a_diverging_one
if sys.argv[2] == "before publishing":
    search.publish_search = lambda *_: os._exit(9)
print(search.run_search(TuneConfig.model_validate_json(sys.argv[1])).table())
"""


def with_a_diverging_one(config: TuneConfig, *, grid: bool) -> list[dict[str, Any]]:
    """Trials of the merge decoder; the second fails before its first report, every time."""
    return [
        {
            "decoder": "merge",
            "width": 16,
            "optimizer": "adam",
            "learning_rate": 1e30 if number == 1 else 0.02 / 2**number,
            "dropout": 0.2,
        }
        for number in range(config.num_samples)
    ]


def start(config: TuneConfig, phase: str = "") -> subprocess.Popen[bytes]:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, config.model_dump_json(), phase],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def wait_for(driver: subprocess.Popen[bytes], place: Path, pattern: str) -> None:
    deadline = time.monotonic() + 600
    while not list(place.glob(pattern)):
        assert driver.poll() is None, "the search ended before it could be killed"
        assert time.monotonic() < deadline, f"no {pattern}"
        time.sleep(0.05)


def has_whole_checkpoint(run: Path) -> bool:
    """Whether Ray Train lists one; it writes its list in place."""
    try:
        return latest_checkpoint((run / CHECKPOINTS).read_bytes()) is not None
    except ValueError:
        return False


@pytest.mark.chaos
def test_search_killed_in_every_phase_is_published_with_the_trials_of_an_unbroken_one(
    features: str, tmp_path: Path
) -> None:
    """Killed as its first trial begins, with a trial that failed for good, with one in its middle, with all over."""
    changes = {"max_concurrent": 1, "num_samples": 4, "max_epochs": 3}
    config = settings(features, tmp_path / odd.NAME, **changes)
    trials = tmp_path / odd.NAME / WORK / "trials"
    for pattern in ("000/_work/run", "001.json", "002/_work/run/checkpoint_*"):
        driver = start(config)
        wait_for(driver, trials, pattern)
        driver.kill()
        driver.wait()
    assert start(config, "before publishing").wait() == 9
    # In this process, without the replacements: nothing is left to do but publish.
    patch = pytest.MonkeyPatch()
    patch.setattr(search, "draw_trials", with_a_diverging_one)
    with patch.context() as patched:
        patched.setattr(search, "_run_trials", None)
        broken = run_search(config)
    unbroken = run_search(settings(features, tmp_path / "unbroken", **changes))
    patch.undo()

    def told(result: SearchResult) -> list[Any]:
        return [(trial.status, trial.curve, trial.error) for trial in result.trials]

    assert told(broken) == told(unbroken)
    assert broken.best == unbroken.best
    assert {trial.status for trial in broken.trials} == {"finished", "stopped", "failed"}
    assert load_model(f"{broken.uri}/model")


def test_trial_that_failed_for_a_passing_reason_is_tried_again(
    features: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store is out of reach when the trial begins, and back for the next try."""
    store = tmp_path / "features"
    shutil.copytree(features, store)
    monkeypatch.setattr(search, "start_ray", lambda: store.rename(tmp_path / "away"))
    monkeypatch.setattr(search, "_PAUSE_SECONDS", 8.0)
    config = settings(str(store), tmp_path / "out", num_samples=1, max_epochs=1, scheduler="none")
    notes = tmp_path / "out" / WORK / "trials" / "000.json"
    with pytest.raises(OutOfReachError, match=r"no trial has ended an epoch yet: .* no manifest"):
        run_search(config.model_copy(update={"trial_retries": 0}))
    said = []

    def come_back() -> None:
        notes.unlink()
        while not notes.exists():
            time.sleep(0.05)
        said.append(notes.read_text())
        (tmp_path / "away").rename(store)

    (tmp_path / "away").rename(store)
    thread = threading.Thread(target=come_back)
    thread.start()
    result = run_search(config)
    thread.join()
    assert "has no manifest" in said[0]
    assert [trial.status for trial in result.trials] == ["finished"]


@pytest.mark.chaos
def test_where_no_trial_came_to_its_end_the_best_is_published_as_it_stands(
    features: str, tmp_path: Path
) -> None:
    config = settings(features, tmp_path / "out", num_samples=1, max_epochs=50)
    driver = start(config)
    runs = tmp_path / "out" / WORK / "trials/000/_work/run"
    wait_for(driver, runs, CHECKPOINTS)
    while not has_whole_checkpoint(runs):
        assert driver.poll() is None
        time.sleep(0.05)
    driver.kill()
    driver.wait()
    write_note(config.output, 0, Note(status="failed", error="loss is nan", diverged=True))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(search, "draw_trials", with_a_diverging_one)
        result = run_search(config)
    assert [trial.status for trial in result.trials] == ["failed"]
    assert "loss is nan" in result.table()
    assert 0 < len(result.trials[0].curve) < 50
    assert load_model(f"{result.uri}/model")


def test_when_its_time_is_over_the_best_so_far_is_published(features: str, tmp_path: Path) -> None:
    epochs = 100_000
    changes = {"num_samples": 2, "max_concurrent": 1, "max_epochs": epochs, "scheduler": "none"}
    config = settings(features, tmp_path / "out", decoders=("merge",), time_budget=0.6, **changes)
    started = time.monotonic()
    result = run_search(config)
    assert time.monotonic() - started > 36
    assert [trial.status for trial in result.trials] == ["unfinished", "unfinished"]
    assert result.best == 0
    assert 0 < len(result.trials[0].curve) < epochs
    assert result.trials[1].curve == []
    assert load_model(f"{result.uri}/model")
