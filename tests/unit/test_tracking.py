"""Runs in MLflow's own store: begun once, followed epoch by epoch, ended with what was found."""

import json
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from captioner.artifacts.manifests import MANIFEST
from captioner.errors import ConfigError
from captioner.training import tracking
from captioner.training.history import EpochRecord
from captioner.training.publish import HISTORY_ROWS
from captioner.training.tracking import FILE, Tracker

mlflow = pytest.importorskip("mlflow")


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}/store")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "pictures")
    return mlflow.MlflowClient()


def model(root: Path, epochs: int) -> str:
    """As much of a published model as tells its epochs."""
    root.mkdir(exist_ok=True)
    history = [
        EpochRecord(
            epoch=number, train_loss=3.0 / number, train_accuracy=0.1, validation_loss=4.0 / number,
            validation_accuracy=0.2, learning_rate=0.1, seconds=1.0, captions_per_second=9.0, data_wait_fraction=0.0,
        ).model_dump()
        for number in range(1, epochs + 1)
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(history, HISTORY_ROWS), root / "history.parquet")
    (root / MANIFEST).touch()
    return str(root)


def test_a_run_is_begun_once_and_has_curves_scores_and_pictures(
    client: Any, tmp_path: Path
) -> None:
    work, settings = str(tmp_path / "work"), {"epochs": 3, "decoder": {"kind": "merge", "width": 8}}
    tracker = Tracker("mlflow", work)
    tracker.begin("run", "my model", settings)
    tracker.follow("run", model(tmp_path / "model", 1))
    tracker.follow("run", str(tmp_path / "model"))
    # Killed and continued: the same run.
    continued = Tracker("mlflow", work)
    continued.begin("run", "my model", settings | {"epochs": 3})
    continued.follow("run", model(tmp_path / "model", 3))
    continued.end(
        "run", scores={"best": 1.5}, tags={"model": "s3://b/m"}, pictures={"curves.png": b"\x89PNG"}
    )
    experiment = client.get_experiment_by_name("pictures")
    (run,) = client.search_runs([experiment.experiment_id])
    assert json.loads((tmp_path / "work" / FILE).read_text()) == {"run": run.info.run_id}
    assert (run.info.run_name, run.info.status) == ("my model", "FINISHED")
    assert run.data.params["decoder.kind"] == "merge"
    assert run.data.metrics["best"] == 1.5
    assert run.data.tags["model"] == "s3://b/m"
    points = client.get_metric_history(run.info.run_id, "validation_loss")
    assert {(point.step, point.value) for point in points} == {(1, 4.0), (2, 2.0), (3, 4 / 3)}
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["curves.png"]


def test_a_search_has_children(client: Any, tmp_path: Path) -> None:
    tracker = Tracker("mlflow", str(tmp_path / "work"))
    tracker.begin("search", "my search", {"space": "wide"})
    tracker.begin("trial-000", "trial-000", {"width": 8}, parent="search")
    tracker.end("trial-000", "FAILED", tags={"status": "failed"})
    runs = client.search_runs([client.get_experiment_by_name("pictures").experiment_id])
    by_name = {run.info.run_name: run for run in runs}
    child, parent = by_name["trial-000"], by_name["my search"]
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert (child.info.status, parent.info.status) == ("FAILED", "RUNNING")


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError("x"), "FAILED"), (KeyboardInterrupt(), "KILLED")]
)
def test_a_run_that_ends_badly_says_so(
    client: Any, tmp_path: Path, error: BaseException, status: str
) -> None:
    tracker = Tracker("mlflow", str(tmp_path / "work"))
    tracker.begin("run", "r", {})
    with pytest.raises(type(error)), tracker.ended_with("run"):
        raise error
    (run,) = client.search_runs([client.get_experiment_by_name("pictures").experiment_id])
    assert run.info.status == status


def test_a_job_goes_on_without_its_mlflow(
    client: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = Tracker("mlflow", str(tmp_path / "work"))
    tracker.begin("run", "r", {})
    client.delete_run(
        client.search_runs(["0", *[e.experiment_id for e in client.search_experiments()]])[
            0
        ].info.run_id
    )
    with caplog.at_level(logging.WARNING):
        tracker.follow("run", model(tmp_path / "model", 2))
        tracker.end("run")
    assert "MLflow: " in caplog.text
    assert "\n" not in caplog.records[0].getMessage()


class Boto(Exception):
    """As a store's client raises, which MLflow hands on as it is."""


def test_whatever_a_store_raises_is_told_once(
    client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = Tracker("mlflow", str(tmp_path / "work"))
    tracker.begin("run", "r", {})

    def fail(*_: Any, **__: Any) -> None:
        raise Boto("Unable to locate credentials\n" + "and so on " * 99)

    with monkeypatch.context() as broken:
        broken.setattr(mlflow.MlflowClient, "log_artifact", fail)
        broken.setattr(mlflow.MlflowClient, "log_batch", fail)
        for epochs in (1, 2):
            tracker.follow("run", model(tmp_path / "model", epochs))
        tracker.end("run", pictures={"curves.png": b""})
        broken.setattr(mlflow.MlflowClient, "get_experiment_by_name", fail)
        with pytest.raises(ConfigError, match="track: MLflow at file:.*: Unable to locate"):
            Tracker("mlflow", str(tmp_path / "work"))
    (told,) = [line for line in caplog.messages if line.startswith("MLflow")]
    assert told.startswith("MLflow: Unable to locate credentials and so on")
    tracker.follow("run", str(tmp_path / "model"))
    (run,) = client.search_runs([client.get_experiment_by_name("pictures").experiment_id])
    assert len(client.get_metric_history(run.info.run_id, "validation_loss")) == 2


def test_nobody_follows_without_being_asked(tmp_path: Path) -> None:
    tracker = Tracker(None, str(tmp_path / "work"))
    tracker.begin("run", "r", {})
    tracker.follow("run", "nowhere")
    tracker.end("run")
    assert not tracker.follows
    assert list(tmp_path.iterdir()) == []


def test_mlflow_that_cannot_be_used_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://here")
    with pytest.raises(ConfigError, match=r"track: MLflow at nonsense://here: ") as error:
        Tracker("mlflow", str(tmp_path))
    assert "\n" not in str(error.value)
    monkeypatch.setitem(__import__("sys").modules, "mlflow", None)
    with pytest.raises(ConfigError, match="track: MLflow is not installed"):
        Tracker("mlflow", str(tmp_path))
    assert tracking.FILE == "mlflow.json"
