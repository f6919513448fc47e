"""Finetuning on a real Ray: what it brings, and that workers, kills and restarts change nothing."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from captioner.artifacts.model_directory import load_model
from captioner.artifacts.output import WORK
from captioner.config import EvaluateConfig, FinetuneConfig, ShapesConfig, SourceConfig
from captioner.errors import ConfigError, SourceError, StoreError
from captioner.evaluation.evaluate import evaluate
from captioner.training.finetune import run_finetuning
from captioner.training.run import TrainResult
from tests.cluster.test_training import KillOneWorker
from tests.finetuning import write_fresh_model
from tests.head import ROOT
from tests.pictures import picture

pytestmark = [pytest.mark.usefixtures("local_ray"), pytest.mark.timeout(900)]

SHAPES = ShapesConfig(train=96, validation=24, test=2)
SOURCE = SourceConfig(shapes=SHAPES)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_fresh_model(tmp_path_factory.mktemp("models") / "model", SHAPES)


def settings(model: str, output: Path, **changes: Any) -> FinetuneConfig:
    return FinetuneConfig(
        model=model,
        source="shapes",
        source_options=SOURCE,
        output=str(output),
        epochs=2,
        stages=4,
        learning_rate=3e-3,
        encoder_learning_rate=1e-3,
        warmup_steps=4,
        global_batch=60,
        mirror=False,
        seed=1,
    ).model_copy(update=changes)


def losses(result: TrainResult) -> list[tuple[float | None, float]]:
    return [(one.train_loss, one.validation_loss) for one in result.history]


@pytest.fixture(scope="module")
def alone(model: str, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """Of one worker that nobody disturbs."""
    return run_finetuning(settings(model, tmp_path_factory.mktemp("alone") / "model"))


def test_the_result_is_a_model_with_its_own_encoder_and_scores_as_its_worker_found(
    model: str, alone: TrainResult, tmp_path: Path
) -> None:
    before, after = (load_model(uri).record.encoder for uri in (model, alone.uri))
    assert after.spec.weights_sha256 != before.spec.weights_sha256
    assert after.weights == "random, finetuned"
    assert run_finetuning(settings(model, Path(alone.uri))) == alone  # which is complete
    report = evaluate(
        EvaluateConfig(
            model=alone.uri,
            source="shapes",
            source_options=SOURCE,
            output=str(tmp_path / "report"),
            meteor=False,
        )
    )
    assert report.scores["loss"] == pytest.approx(alone.best.validation_loss, rel=1e-3)
    assert alone.history[-1].train_loss < 0.97 * alone.history[0].train_loss


def test_two_workers_of_which_one_is_killed_within_an_epoch_learn_as_one_does(
    model: str, alone: TrainResult, tmp_path: Path
) -> None:
    marker = tmp_path / "killed"
    together = run_finetuning(
        settings(model, tmp_path / "two", num_workers=2, checkpoint_minutes=1e-9),
        callbacks=[KillOneWorker(marker, epoch=1, within=True)],
    )
    assert marker.read_text() == "2"
    for one, two in zip(losses(alone), losses(together), strict=True):
        assert one == pytest.approx(two, rel=1e-3)


@pytest.mark.chaos
def test_a_killed_driver_changes_nothing(model: str, alone: TrainResult, tmp_path: Path) -> None:
    config = settings(model, tmp_path / "broken", checkpoint_minutes=1e-9)
    program = (
        "import sys; from captioner.config import FinetuneConfig;"
        "from captioner.training.finetune import run_finetuning;"
        "run_finetuning(FinetuneConfig.model_validate_json(sys.argv[1]))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    driver = subprocess.Popen(
        [sys.executable, "-c", program, config.model_dump_json()],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    work = tmp_path / "broken" / WORK / "run"
    deadline = time.monotonic() + 300
    while len(list(work.glob("checkpoint_*/history.json"))) < 2:
        assert driver.poll() is None, "the driver ended before it could be killed"
        assert time.monotonic() < deadline, "no checkpoint appeared"
        time.sleep(0.02)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert not (tmp_path / "broken" / "manifest.json").exists()
    broken = run_finetuning(config)
    assert losses(broken) == losses(alone)
    files = [Path(found.uri) / "weights.safetensors" for found in (alone, broken)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_what_cannot_be_is_refused_before_anything_is_learnt(model: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="stages: 99 are more than the"):
        run_finetuning(settings(model, tmp_path / "stages", stages=99))
    assert not (tmp_path / "stages").exists()
    folder = tmp_path / "photographs"
    folder.mkdir()
    for number in range(8):
        (folder / f"{number}.jpg").write_bytes(picture(number)[: 300 if number == 3 else None])
    lines = [f"{number}.jpg,a red circle" for number in range(8)]
    (folder / "captions.csv").write_text("\n".join(["image,caption", *lines]))
    changes = {"source": str(folder), "source_options": SourceConfig(split="train")}
    with pytest.raises(SourceError, match="no captions in split 'validation'; .* train .8"):
        run_finetuning(settings(model, tmp_path / "split", **changes))
    splits = ["train", "validation"] * 4
    lines = [f"{number}.jpg,a red circle,{split}" for number, split in enumerate(splits)]
    (folder / "captions.csv").write_text("\n".join(["image,caption,split", *lines]))
    changes["source_options"] = SourceConfig()
    config = settings(model, tmp_path / "bad", epochs=1, **changes)
    with pytest.raises(SourceError, match="1 of 8 images were rejected"):
        run_finetuning(config)
    found = run_finetuning(config.model_copy(update={"max_reject_fraction": 0.2}))
    assert len(found.history) == 1
    assert "3.jpg" in (tmp_path / "bad/rejects.csv").read_text()
    with pytest.raises(StoreError, match="was made by another run: training.stages"):
        run_finetuning(config.model_copy(update={"stages": 1}))
