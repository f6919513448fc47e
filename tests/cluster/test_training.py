"""Whole training runs on a real local Ray: workers agree, failures change nothing, the model directory is whole."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import ray
import safetensors.torch
import torch
from ray.train import ControllerError, UserCallback, WorkerGroupError

from captioner.artifacts.feature_store import FeatureStore
from captioner.artifacts.model_directory import load_model
from captioner.artifacts.output import WORK
from captioner.config import DecodeConfig, DecoderConfig, OptimizerConfig, TrainConfig
from captioner.errors import ConfigError, StoreError, TrainingError
from captioner.runtime.progress import TrainingGauges
from captioner.serving.metrics import exposition
from captioner.text import END, START
from captioner.training import run
from captioner.training.fit import error_of_ours
from captioner.training.history import EpochRecord
from captioner.training.ingest import open_split
from captioner.training.run import TrainResult, run_training
from captioner.training.steps import TeacherForcing
from tests.stores import write_store

ROOT = Path(__file__).resolve().parents[2]
EPOCHS = 4
TWO_WORKERS = {"num_workers": 2, "validation_cider": True}

# A fit takes ten seconds on an idle machine, minutes where others compete for the cores.
pytestmark = [pytest.mark.usefixtures("local_ray"), pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> str:
    """75 train captions: in batches of 37 the last one holds a single caption, nothing for a second worker."""
    return write_store(
        tmp_path_factory.mktemp("store") / "features", {"train": 25, "validation": 7}
    )


def settings(features: str, output: Path, **changes: Any) -> TrainConfig:
    base: dict[str, Any] = {
        "features": features,
        "output": str(output),
        "decoder": DecoderConfig(width=16, output_width=16, dropout=0.3, ensemble_size=2),
        "optimizer": OptimizerConfig(
            learning_rate=0.02, schedule="plateau", plateau_patience=1, warmup_steps=3
        ),
        "epochs": EPOCHS,
        "global_batch": 37,
        "patience": None,
        "ema_decay": 0.6,
        "decode": DecodeConfig(mbr_samples=4),
        "compute": "float32",
    }
    return TrainConfig.model_validate(base | changes)


def values(history: list[EpochRecord]) -> list[dict[str, Any]]:
    """What of a history is not a matter of the clock."""
    clock = {"seconds", "captions_per_second", "data_wait_fraction"}
    return [record.model_dump(exclude=clock, exclude_none=True) for record in history]


@pytest.fixture(scope="module")
def unbroken(features: str, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """Two workers with dropout, the best epoch by CIDEr-D, undisturbed."""
    output = tmp_path_factory.mktemp("unbroken") / "model"
    return run_training(settings(features, output, **TWO_WORKERS))


@dataclass(frozen=True)
class Gauges:
    figures: dict[str, float]
    until: float
    """When Ray would have forgotten what was set once, by the monotonic clock."""


@pytest.fixture(scope="module", autouse=True)
def gauges(local_ray: None) -> Iterator[Gauges]:
    """The figures of a training whose epoch takes as long as all tests of this module."""
    figures = {
        "captions_per_second": 90.0, "data_wait_fraction": 0.25, "epoch": 3.0, "validation_loss": 2.5
    }  # fmt: skip

    @ray.remote(num_cpus=0)
    def train() -> None:
        with TrainingGauges("runs/süme") as gauges:
            gauges.set(figures)
            time.sleep(3600)

    working = train.remote()
    yield Gauges(figures, time.monotonic() + 45)
    ray.cancel(working)


class CountWorkers(UserCallback):
    """The number of workers of every report, noted in a file."""

    def __init__(self, file: Path):
        self.file = file

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any
    ) -> None:
        with self.file.open("a") as file:
            file.write(f"{len(metrics)}\n")


class KillOneWorker(UserCallback):
    """SIGKILL to one training worker after a given epoch's report, or after a checkpoint within the next one, once."""

    def __init__(self, marker: Path, epoch: int, *, within: bool = False):
        self.marker, self.epoch, self.within = marker, epoch, within
        self.seen = False

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any
    ) -> None:
        ended = metrics[0].get("epoch")
        self.seen = self.seen or ended == self.epoch
        if not self.seen or (self.within and ended is not None) or self.marker.exists():
            return
        # The callback runs in the run's controller; workers are its siblings under one raylet.
        listed = subprocess.run(
            ["ps", "-o", "pid=,args=", "--ppid", str(os.getppid())], capture_output=True, text=True
        ).stdout
        workers = [line.split()[0] for line in listed.splitlines() if "RayTrainWorker" in line]
        self.marker.write_text(str(len(workers)))
        os.kill(int(workers[-1]), signal.SIGKILL)


def test_two_workers_train_as_one(features: str, tmp_path: Path) -> None:
    without_dropout = DecoderConfig(width=16, output_width=16, dropout=0.0)
    alone, together = (
        run_training(
            settings(
                features,
                tmp_path / f"{workers}",
                decoder=without_dropout,
                num_workers=workers,
                epochs=5,
                validation_cider=True,
            ),
            callbacks=[CountWorkers(tmp_path / f"{workers}.txt")],
        )
        # Elastic: the cluster has room for the second worker.
        for workers in (1, (1, 2))
    )
    reports = [set((tmp_path / f"{workers}.txt").read_text().split()) for workers in (1, (1, 2))]
    assert reports == [{"1"}, {"2"}]
    assert len(alone.history) == 5
    assert alone.history[-1].train_loss < 0.9 * alone.history[0].train_loss
    for one, two in zip(values(alone.history), values(together.history), strict=True):
        assert one == pytest.approx(two, rel=1e-4)
    models = [load_model(result.uri).decoder.state_dict() for result in (alone, together)]
    torch.testing.assert_close(dict(models[0]), dict(models[1]), rtol=1e-3, atol=1e-5)


def weights(result: TrainResult) -> bytes:
    return (Path(result.uri) / "weights.safetensors").read_bytes()


@pytest.mark.long
def test_same_seed_gives_the_same_history_and_weights_even_when_a_worker_is_killed(
    unbroken: TrainResult, features: str, tmp_path: Path
) -> None:
    """Within its last epoch, after the checkpoint of that epoch's first step."""
    marker = tmp_path / "killed"
    config = settings(features, tmp_path / "model", checkpoint_minutes=1e-9, **TWO_WORKERS)
    killer = KillOneWorker(marker, epoch=EPOCHS - 1, within=True)
    result = run_training(config, callbacks=[killer])
    assert marker.read_text() == "2"
    assert values(result.history) == values(unbroken.history)
    assert weights(result) == weights(unbroken)


@pytest.mark.long
def test_streamed_features_train_two_workers_to_the_same_end_even_when_one_is_killed(
    tmp_path: Path,
) -> None:
    features = write_store(tmp_path / "features", {"train": 25, "validation": 7}, uncaptioned=1, files=9)  # fmt: skip
    streamed = {"num_workers": 2, "ingest": "streaming"}
    quiet = run_training(settings(features, tmp_path / "quiet", **streamed))
    marker = tmp_path / "killed"
    config = settings(features, tmp_path / "model", **streamed)
    result = run_training(config, callbacks=[KillOneWorker(marker, epoch=2)])
    assert marker.read_text() == "2"
    assert values(result.history) == values(quiet.history)
    assert weights(result) == weights(quiet)


@pytest.mark.chaos
def test_a_killed_driver_changes_nothing(
    unbroken: TrainResult, features: str, tmp_path: Path
) -> None:
    config = settings(features, tmp_path / "model", **TWO_WORKERS)
    program = (
        "import sys; from captioner.config import TrainConfig; from captioner.training.run import run_training;"
        "run_training(TrainConfig.model_validate_json(sys.argv[1]))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    driver = subprocess.Popen(
        [sys.executable, "-c", program, config.model_dump_json()],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    work = tmp_path / "model" / WORK / "run"
    deadline = time.monotonic() + 200
    while len(list(work.glob("checkpoint_*/history.json"))) < 2:
        assert driver.poll() is None, "the driver ended before it could be killed"
        assert time.monotonic() < deadline, "no checkpoint appeared"
        time.sleep(0.02)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert not (tmp_path / "model" / "manifest.json").exists()
    result = run_training(config)
    assert values(result.history) == values(unbroken.history)
    assert weights(result) == weights(unbroken)
    assert not (tmp_path / "model" / WORK).exists()


@pytest.mark.long
def test_a_run_that_stopped_early_and_was_killed_before_publishing_only_publishes(
    features: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A rate far too high makes the validation loss rise at once.
    wild = OptimizerConfig(learning_rate=0.5, schedule="constant")
    config = settings(features, tmp_path / "model", optimizer=wild, epochs=40, patience=2)

    class Killed(BaseException):
        pass

    def killed(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(run, "write_model", killed)
        with pytest.raises(Killed):
            run_training(config)
    assert not (tmp_path / "model" / "manifest.json").exists()
    before = max((tmp_path / "model" / WORK).rglob("history.json"))
    seconds = [record["seconds"] for record in json.loads(before.read_text())]
    result = run_training(config)
    assert [record.seconds for record in result.history] == seconds
    assert len(result.history) == result.best.epoch + 2 < 40


def test_drawn_captions_teach_a_model_that_is_published_already(
    unbroken: TrainResult, features: str, tmp_path: Path
) -> None:
    config = TrainConfig(
        features=features,
        output=str(tmp_path / "model"),
        init=unbroken.uri,
        objective="self_critical",
        samples=3,
        global_batch=18,
        epochs=2,
        patience=None,
        num_workers=2,
        optimizer=OptimizerConfig(learning_rate=1e-3),
        compute="float32",
    )
    result = run_training(config)
    assert [record.train_loss for record in result.history] == [None, None]
    for record in result.history:
        assert record.train_cider is not None
        assert 0 < record.train_cider < 10
        assert record.validation_cider is not None
    model, there = load_model(result.uri), load_model(unbroken.uri)
    assert model.record.decoder == there.record.decoder
    assert model.record.decode == there.record.decode
    assert weights(result) != weights(unbroken)
    assert run_training(config) == result
    with pytest.raises(StoreError, match="training.samples: 3 there, 4 asked"):
        run_training(config.model_copy(update={"samples": 4}))


def test_finished_model_is_left_alone_and_another_is_refused(
    unbroken: TrainResult, features: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = settings(features, Path(unbroken.uri), validation_cider=True)
    before = {file: file.stat().st_mtime_ns for file in Path(unbroken.uri).rglob("*")}
    with caplog.at_level(logging.INFO):
        assert run_training(config) == unbroken
    assert "is complete" in caplog.text
    with pytest.raises(StoreError, match="training.seed: 0 there, 5 asked"):
        run_training(config.model_copy(update={"seed": 5}))
    assert before == {file: file.stat().st_mtime_ns for file in Path(unbroken.uri).rglob("*")}


def test_published_weights_are_those_of_the_best_epoch(
    unbroken: TrainResult, features: str
) -> None:
    model = load_model(unbroken.uri)
    store, config = FeatureStore.open(features), settings(features, Path("unused"), global_batch=99)
    way = open_split(
        store,
        "validation",
        ("pooled",),
        model.vocabulary,
        config,
        rank=0,
        workers=1,
        memory=2**40,
    )
    (batch,) = way.ordered()
    with torch.no_grad():
        loss, correct = TeacherForcing(model.decoder).eval()(batch.features, batch.tokens)
    assert float(loss) / batch.global_targets == pytest.approx(
        unbroken.best.validation_loss, rel=1e-5
    )
    assert int(correct) / batch.global_targets == pytest.approx(unbroken.best.validation_accuracy)


def test_model_directory_holds_history_curves_and_events(unbroken: TrainResult) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    root = Path(unbroken.uri)
    ngrams = load_model(unbroken.uri).ngrams
    assert ngrams.images == 25
    assert ngrams.counts[(END,)] == 25
    assert START not in {word for ngram in ngrams.counts for word in ngram}
    history = pd.read_parquet(root / "history.parquet")
    assert history["epoch"].tolist() == list(range(1, EPOCHS + 1))
    assert unbroken.best.validation_cider == history["validation_cider"].max()
    assert json.loads((root / "metrics.json").read_text()) == unbroken.best.model_dump()
    assert (root / "curves.png").read_bytes().startswith(b"\x89PNG")
    events = EventAccumulator(str(root / "tensorboard"))
    events.Reload()
    losses = [event.value for event in events.Scalars("loss/validation")]
    assert losses == pytest.approx(history["validation_loss"].tolist())
    assert {path.name for path in root.iterdir()} == {
        "_job.json", "config.json", "curves.png", "encoder.safetensors", "history.parquet",
        "last.safetensors", "manifest.json", "metrics.json", "ngrams.safetensors",
        "tensorboard", "vocab.json", "weights.safetensors",
    }  # fmt: skip


def test_a_loss_that_is_not_finite_stops_training_and_keeps_the_last_good_checkpoint(
    features: str, tmp_path: Path
) -> None:
    # Every step multiplies the weights by about -100, which takes a few epochs to leave float32.
    explosive = OptimizerConfig(
        name="adamw", learning_rate=1.0, weight_decay=100.0, schedule="constant", clip_norm=None
    )
    config = settings(features, tmp_path / "model", optimizer=explosive, num_workers=2, epochs=20)
    with pytest.raises(TrainingError, match=r"^\w+ loss is \w+ in epoch \d") as stopped:
        run_training(config)
    assert "\n" not in str(stopped.value)
    assert not (tmp_path / "model" / "manifest.json").exists()
    assert str(stopped.value).endswith(f"kept in {tmp_path / 'model' / WORK}")
    kept = max((tmp_path / "model" / WORK / "run").glob("checkpoint_*/history.json"))
    history = json.loads(kept.read_text())
    assert f"in epoch {len(history) + 1}:" in str(stopped.value)
    weights = safetensors.torch.load_file(kept.with_name("last.safetensors"))
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_an_error_of_ours_comes_out_of_a_failed_run_unchanged() -> None:
    ours = StoreError("column: a colon: and another")
    wrapped = RuntimeError("worker failed")
    wrapped.__cause__ = ours
    assert error_of_ours(WorkerGroupError("...", {1: wrapped})) is ours
    for foreign in (WorkerGroupError("...", {0: OSError()}), ControllerError(RuntimeError("lost"))):
        assert error_of_ours(foreign) is foreign


def test_more_workers_than_cpus_is_refused(features: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="num-workers: 5 need as many CPUs, the cluster has 4"):
        run_training(settings(features, tmp_path / "model", num_workers=5))


@pytest.mark.long
def test_figures_of_an_epoch_are_there_to_scrape_until_the_next_one(gauges: Gauges) -> None:
    deadline = gauges.until + 60
    while scraped() != gauges.figures:
        assert time.monotonic() < deadline
        time.sleep(1)
    while time.monotonic() < gauges.until:
        time.sleep(1)
    for _ in range(2):
        time.sleep(5)
        assert scraped() == gauges.figures


def scraped() -> dict[str, float]:
    """What Prometheus would read of the run ``runs/süme``."""
    form = r'ray_captioner_training_(\w+){.*run="runs/s.*me".*} (\S+)'
    return {name: float(value) for name, value in re.findall(form, exposition())}
