"""Every job from S3 to S3, on a server that speaks its protocol: published once, continued when killed."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import boto3
import pyarrow.parquet as pq
import pytest
import ray
from moto.server import ThreadedMotoServer
from ray.cluster_utils import Cluster

from captioner import storage
from captioner.artifacts.feature_store import FeatureStore
from captioner.artifacts.manifests import FileEntry, ModelManifest, open_manifest
from captioner.artifacts.model_directory import load_model
from captioner.artifacts.output import MANIFEST, WORK, Output
from captioner.captioning.collection import caption_collection
from captioner.config import (
    CaptionConfig,
    DecodeOverrides,
    DecoderConfig,
    EncoderConfig,
    EvaluateConfig,
    ExtractConfig,
    TrainConfig,
)
from captioner.encoders.weights import ENCODER_WEIGHTS
from captioner.errors import StoreError
from captioner.evaluation.evaluate import evaluate
from captioner.features.extract import extract
from captioner.features.row_marks import CHECKPOINT
from captioner.runtime.cluster import start_ray
from captioner.sources.scenes import draw_scene, make_scene
from captioner.training.run import run_training

ROOT = Path(__file__).resolve().parents[2]
BUCKET = "pictures"
SIZES = {"train": 32, "validation": 8}

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """URI of a bucket on a free port; drivers find it by the environment, as any S3 client.

    The cluster is started before: its nodes have credentials, and learn from the drivers alone where the bucket is.
    """
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name in storage.S3_ADDRESS_VARIABLES:
            patch.delenv(name, raising=False)
        patch.setenv("AWS_ACCESS_KEY_ID", "nobody")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
        nodes = {"num_cpus": 4, "object_store_memory": 10**9, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=nodes)
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        patch.setenv("RAY_ADDRESS", cluster.address)
        try:
            start_ray()
            yield f"s3://{BUCKET}"
        finally:
            ray.shutdown()
            cluster.shutdown()
    server.stop()


@ray.remote
def environments() -> tuple[set[str], set[str]]:
    """Names of the variables of the node, by its raylet, and of a worker of this job."""
    entries = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
    return {entry.partition(b"=")[0].decode() for entry in entries}, set(os.environ)


def test_workers_learn_the_endpoint_from_the_driver_and_no_secret(bucket: str) -> None:
    node, worker = ray.get(environments.remote())
    assert "AWS_SECRET_ACCESS_KEY" in node
    assert not node & set(storage.S3_ADDRESS_VARIABLES)
    assert {"AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION"} <= worker
    shown = ray.get_runtime_context().get_runtime_env_string()
    assert "AWS_ENDPOINT_URL" in shown
    assert "KEY" not in shown


def keys(prefix: str) -> list[str]:
    """What boto3, not pyarrow, finds below a prefix."""
    found = boto3.client("s3").list_objects_v2(Bucket=BUCKET, Prefix=prefix)
    return [entry["Key"].removeprefix(prefix) for entry in found.get("Contents", [])]


@pytest.fixture(scope="module")
def features(bucket: str) -> str:
    """A store extracted from a folder of pictures with captions, by a run that was killed and one that continued."""
    captions = []
    for split, size in SIZES.items():
        for index in range(size):
            name = f"{split}-{index:02d}.png"
            storage.write_bytes(f"{bucket}/photos/{name}", draw_scene(0, split, index))
            # One validation image has no captions.
            none = (split, index) == ("validation", 0)
            sentences = [] if none else make_scene(0, split, index).captions()
            captions.append(
                {"filename": name, "split": split[:5].replace("valid", "val"),
                 "sentences": [{"raw": text} for text in sentences]}
            )  # fmt: skip
    dataset = json.dumps({"images": captions, "dataset": "scenes"})
    storage.write_bytes(f"{bucket}/captions/dataset.json", dataset.encode())
    output = f"{bucket}/features"
    config = ExtractConfig.model_validate(
        {
            "source": f"{bucket}/photos",
            "source_options": {"captions": f"{bucket}/captions/dataset.json"},
            "output": output,
            "encoder": EncoderConfig(weights="random", layer="layer3", compute="float32"),
            "batch_size": 8,
        }
    )
    program = (
        "import sys; from captioner.config import ExtractConfig; from captioner.features.extract import extract;"
        "extract(ExtractConfig.model_validate_json(sys.argv[1]))"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program, config.model_dump_json()],
        cwd=ROOT,
        env=os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 200
    while not (
        done := [
            key for key in keys(f"features/{WORK}/{CHECKPOINT}/") if ".pending" not in key and key
        ]
    ):
        if child.poll() is not None:
            pytest.fail(f"ended before it could be killed: {child.communicate()[1][-2000:]}")
        assert time.monotonic() < deadline, "no file was finished"
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert MANIFEST not in keys("features/")
    before = {key.removesuffix(".parquet") for key in done}
    extract(config)
    # The first run's files are among the published ones: they were not made again.
    published = {Path(key).name for key in keys("features/features/")}
    assert all(any(name.startswith(mark) for name in published) for mark in before)
    return output


def test_killed_extraction_continues_and_every_image_is_there_once(features: str) -> None:
    store = FeatureStore.open(features)
    assert {split: counts.images for split, counts in store.manifest.splits.items()} == SIZES
    captions = sum(counts.captions for counts in store.manifest.splits.values())
    assert captions == 5 * (sum(SIZES.values()) - 1)
    for split, size in SIZES.items():
        table = store.load(split, ("pooled",))
        assert table.image_ids == [f"{split}-{index:02d}.png" for index in range(size)]
        assert len({vector.tobytes() for vector in table.columns["pooled"]}) > 0.8 * size
    listed = {file.path for file in store.manifest.files} - {ENCODER_WEIGHTS}
    there = {
        key
        for key in keys("features/")
        if key.startswith(("features/", "captions/")) and not key.endswith("/")
    }
    assert there == listed
    assert not [key for key in keys("features/") if key.startswith(WORK)]


@pytest.fixture(scope="module")
def model(features: str, bucket: str) -> str:
    config = TrainConfig(
        features=features,
        output=f"{bucket}/model",
        decoder=DecoderConfig(width=16, output_width=16),
        epochs=2,
        num_workers=2,
        compute="float32",
    )
    result = run_training(config)
    assert run_training(config) == result
    return result.uri


def test_model_is_published_without_its_checkpoints(model: str) -> None:
    loaded = load_model(model)
    assert loaded.record.columns == ("pooled",)
    assert {
        "weights.safetensors",
        "encoder.safetensors",
        "manifest.json",
        "history.parquet",
    } <= set(keys("model/"))
    assert not [key for key in keys("model/") if key.startswith(WORK)]


def test_evaluation_reads_model_features_and_pictures_from_s3(
    model: str, features: str, bucket: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "captioner.runtime.progress")
    report = evaluate(
        EvaluateConfig(
            features=features,
            model=model,
            output=f"{bucket}/report",
            decode=DecodeOverrides(beam_size=1),
        )
    )
    assert report.scores["images"] == SIZES["validation"] - 1
    images = SIZES["validation"] - 1
    assert f" {images} of {images} images" in caplog.text
    assert {"scores.json", "predictions.parquet", "grid.png", "manifest.json"} <= set(
        keys("report/")
    )


def test_collection_is_captioned_from_s3_to_s3(model: str, bucket: str) -> None:
    config = CaptionConfig(
        images=f"{bucket}/photos",
        model=model,
        output=f"{bucket}/captioned",
        decode=DecodeOverrides(beam_size=1, max_length=5),
    )
    manifest = caption_collection(config)
    assert (manifest.counts.images, manifest.counts.rejected) == (sum(SIZES.values()), 0)
    filesystem, path = storage.resolve(f"{bucket}/captioned/captions")
    rows = pq.read_table(path, filesystem=filesystem)
    assert len(set(rows["image_id"].to_pylist())) == len(rows) == sum(SIZES.values())
    assert rows["caption"].null_count == 0


def test_of_two_writers_one_publishes(bucket: str) -> None:
    first, second = (Output(f"{bucket}/contested", {"job": "x"}) for _ in range(2))
    first.publish(ModelManifest(files=[FileEntry(path="1", bytes=1)]))
    with pytest.raises(StoreError, match="another run published first"):
        second.publish(ModelManifest(files=[FileEntry(path="2", bytes=1)]))
    published = open_manifest(f"{bucket}/contested", ModelManifest)
    assert [entry.path for entry in published.files] == ["1"]
    assert Output(f"{bucket}/contested", {"job": "x"}).complete


def test_missing_bucket_is_one_line(bucket: str) -> None:
    with pytest.raises(StoreError) as one:
        FeatureStore.open("s3://no-such-bucket/features")
    assert "\n" not in str(one.value)


def test_failed_write_leaves_no_object(bucket: str) -> None:
    uri = f"{bucket}/half/data.bin"
    with pytest.raises(StoreError, match="injected"), storage.atomic_writer(uri) as file:  # noqa: PT012
        file.write(b"half")
        raise OSError("injected")
    assert keys("half/") == []
