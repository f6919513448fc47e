"""Jobs from a bucket to a bucket: continued where their driver was killed, published once, nothing left over."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray

from captioner import storage
from captioner.artifacts.feature_store import FeatureStore
from captioner.artifacts.model_directory import load_model
from captioner.artifacts.output import MANIFEST, WORK
from captioner.config import DecodeOverrides, EvaluateConfig
from captioner.encoders.weights import ENCODER_WEIGHTS
from captioner.evaluation.evaluate import evaluate
from captioner.features.extract import extract
from captioner.features.rejects import REJECTS
from captioner.features.row_marks import CHECKPOINT
from tests.head import ROOT
from tests.nodes.cluster import Nodes
from tests.nodes.comparison import SIZES, read_rows
from tests.nodes.conftest import extraction

pytestmark = pytest.mark.timeout(900)


@ray.remote
def environments() -> tuple[set[str], set[str]]:
    """Names of the variables of the node, by its raylet, and of a worker of this job."""
    entries = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
    return {entry.partition(b"=")[0].decode() for entry in entries}, set(os.environ)


def test_workers_learn_the_endpoint_from_the_driver_and_no_secret(nodes: Nodes) -> None:
    node, worker = ray.get(environments.remote())
    assert "AWS_SECRET_ACCESS_KEY" in node
    assert not node & set(storage.S3_ADDRESS_VARIABLES)
    assert {"AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION"} <= worker
    shown = ray.get_runtime_context().get_runtime_env_string()
    assert "AWS_ENDPOINT_URL" in shown
    assert "KEY" not in shown


@pytest.fixture(scope="module")
def continued(nodes: Nodes, photos: str) -> str:
    """A store whose first driver was killed when it had finished a file."""
    config = extraction(photos, f"{nodes.uri}/continued")
    program = (
        "import sys; from captioner.config import ExtractConfig; from captioner.features.extract import extract;"
        "extract(ExtractConfig.model_validate_json(sys.argv[1]))"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program, config.model_dump_json()],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 200
    while not nodes.finished_files("continued"):
        if child.poll() is not None:
            pytest.fail(f"ended before it could be killed: {child.communicate()[1][-2000:]}")
        assert time.monotonic() < deadline, "no file was finished"
        time.sleep(0.1)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert MANIFEST not in nodes.keys("continued/")
    marks = nodes.keys(f"continued/{WORK}/{CHECKPOINT}/")
    before = {key.removesuffix(".parquet") for key in marks if key and ".pending" not in key}
    extract(config)
    # The first run's files are among the published ones: they were not made again.
    published = {Path(key).name for key in nodes.keys("continued/features/")}
    assert all(any(name.startswith(mark) for name in published) for mark in before)
    return config.output


def test_killed_extraction_continues_and_every_image_is_there_once(
    nodes: Nodes, features: str, continued: str
) -> None:
    store = FeatureStore.open(continued)
    assert {split: counts.images for split, counts in store.manifest.splits.items()} == SIZES
    captions = sum(counts.captions for counts in store.manifest.splits.values())
    assert captions == 5 * (sum(SIZES.values()) - 1)
    names = [row["image_id"] for row in read_rows(f"{continued}/features").to_pylist()]
    assert names == read_rows(f"{features}/features")["image_id"].to_pylist()
    for split, size in SIZES.items():
        table = store.load(split, ("pooled",))
        assert table.image_ids == [f"{split}-{index:03d}.png" for index in range(size)]
        assert len({vector.tobytes() for vector in table.columns["pooled"]}) > 0.8 * size
    listed = {file.path for file in store.manifest.files} - {ENCODER_WEIGHTS, REJECTS}
    there = {
        key
        for key in nodes.keys("continued/")
        if key.startswith(("features/", "captions/")) and not key.endswith("/")
    }
    assert there == listed
    assert not [key for key in nodes.keys("continued/") if key.startswith(WORK)]


def test_model_is_published_without_its_checkpoints(nodes: Nodes, model: str) -> None:
    loaded = load_model(model)
    assert loaded.record.columns == ("pooled",)
    keys = nodes.keys(f"{model.removeprefix(nodes.uri).strip('/')}/")
    assert {
        "weights.safetensors",
        "encoder.safetensors",
        "manifest.json",
        "history.parquet",
    } <= set(keys)
    assert not [key for key in keys if key.startswith(WORK)]


def test_evaluation_reads_model_features_and_pictures_from_the_bucket(
    nodes: Nodes, model: str, continued: str, capsys: pytest.CaptureFixture[str]
) -> None:
    report = evaluate(
        EvaluateConfig(
            features=continued,
            model=model,
            output=f"{nodes.uri}/report",
            decode=DecodeOverrides(beam_size=1),
        )
    )
    images = SIZES["validation"] - 1  # one has no captions
    assert report.scores["images"] == images
    assert f"{images} of {images} images" in capsys.readouterr().err
    assert {"scores.json", "predictions.parquet", "grid.png", "manifest.json"} <= set(
        nodes.keys("report/")
    )
