"""Every job on three nodes that share only a bucket: a node dies in its middle, and nothing is lost or repeated."""

import io
import json
import random
import time
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from ray import serve

from captioner import storage
from captioner.artifacts.output import WORK
from captioner.captioning.collection import caption_collection
from captioner.config import (
    CaptionConfig,
    DecodeOverrides,
    DecoderConfig,
    EncoderConfig,
    ExtractConfig,
    ServeConfig,
    TrainConfig,
    TuneConfig,
)
from captioner.features.extract import extract
from captioner.features.row_marks import CHECKPOINT
from captioner.serving.run import deploy, url
from captioner.sources.scenes import draw_scene, make_scene
from captioner.training.run import run_training
from captioner.tuning.search import SearchResult, run_search
from tests.head import free_port
from tests.nodes.conftest import ROWS, Nodes

SIZES = {"train": 80, "validation": 16}
BAD = ("cut.png", "empty.jpg", "text.jpg")
IMAGES = sum(SIZES.values()) + len(BAD)

pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def photos(nodes: Nodes) -> str:
    """Pictures with captions, and three that are none."""
    folder, listed = f"{nodes.uri}/photos", []
    for split, size in SIZES.items():
        for index in range(size):
            name = f"{split}-{index:03d}.png"
            storage.write_bytes(f"{folder}/{name}", draw_scene(0, split, index))
            sentences = [{"raw": text} for text in make_scene(0, split, index).captions()]
            listed.append({"filename": name, "split": split, "sentences": sentences})
    whole = draw_scene(0, "train", 0)
    for name, data in zip(BAD, (whole[: len(whole) // 2], b"", b"not a picture"), strict=True):
        storage.write_bytes(f"{folder}/{name}", data)
    dataset = json.dumps({"images": listed, "dataset": "scenes"}).encode()
    storage.write_bytes(f"{folder}/dataset_scenes.json", dataset)
    return folder


def timed(job: Callable[[], object]) -> float:
    started = time.monotonic()
    job()
    return time.monotonic() - started


def read_rows(uri: str) -> pa.Table:
    filesystem, path = storage.resolve(uri)
    return pq.read_table(path, filesystem=filesystem).sort_by("image_id")


def compare(
    job: str, fault: str, uris: tuple[str, str], seconds: tuple[float, float]
) -> tuple[pa.Table, pa.Table]:
    """Rows of the undisturbed run and of the disturbed one, which must be of the same images, each once."""
    expected, found = (read_rows(uri) for uri in uris)
    names, there = expected["image_id"].to_pylist(), found["image_id"].to_pylist()
    lost, repeated = len(set(names) - set(there)), len(there) - len(set(there))
    report(job, fault, str(lost), str(repeated), seconds)
    assert there == names
    assert len(set(names)) == len(names) == IMAGES
    assert found["error"].to_pylist() == expected["error"].to_pylist()
    assert {
        name for name, error in zip(there, found["error"].to_pylist(), strict=True) if error
    } == set(BAD)
    return expected, found


def report(job: str, fault: str, lost: str, repeated: str, seconds: tuple[float, float]) -> None:
    ROWS.append((job, fault, lost, repeated, f"{seconds[0]:.0f} s", f"{seconds[1]:.0f} s"))


def finished_files(nodes: Nodes, output: str) -> int:
    marks = nodes.keys(f"{output}/{WORK}/{CHECKPOINT}/")
    return len([key for key in marks if key and ".pending" not in key])


@pytest.fixture(scope="module")
def features(nodes: Nodes, photos: str) -> str:
    """A feature store, made twice: undisturbed, and while a node died. Checked here, as the other jobs read it."""

    def config(output: str) -> ExtractConfig:
        return ExtractConfig(
            source=photos,
            output=f"{nodes.uri}/{output}",
            encoder=EncoderConfig(weights="random", layer="layer3", compute="float32"),
            max_reject_fraction=0.05,
            batch_size=8,
        )

    undisturbed = timed(lambda: extract(config("features")))
    disturbed = nodes.run_and_kill(
        lambda: extract(config("features-killed")),
        lambda: finished_files(nodes, "features-killed") > 0,
        "MapWorker",
        random.Random(1).uniform(0, 0.5),
    )
    uris = tuple(f"{config(name).output}/features" for name in ("features", "features-killed"))
    expected, found = compare(
        "extraction", "node with an encoder killed", uris, (undisturbed, disturbed)
    )
    good = expected["error"].is_null()
    one, two = (
        table.filter(good)["pooled"].combine_chunks().to_numpy_ndarray()
        for table in (expected, found)
    )
    np.testing.assert_allclose(two, one, rtol=1e-3, atol=1e-4)
    assert len(np.unique(one, axis=0)) > 0.9 * len(one)
    return config("features-killed").output


def test_extraction_survives_the_loss_of_a_node(nodes: Nodes, features: str) -> None:
    manifest = storage.read_json(f"{features}/manifest.json")
    counts = {"ok": sum(SIZES.values()), "rejected": len(BAD), "unreadable": 0, "left_out": {}}
    assert manifest["counts"] == counts
    assert counts["ok"] + counts["rejected"] == IMAGES
    captions = sum(split["captions"] for split in manifest["splits"].values())
    assert captions == 5 * sum(SIZES.values())
    listed = {file["path"] for file in manifest["files"]}
    there = {f"features/{key}" for key in nodes.keys("features-killed/features/") if key}
    assert there == {path for path in listed if path.startswith("features/")}


@pytest.fixture(scope="module")
def model(nodes: Nodes, features: str) -> str:
    """A model, trained twice by two workers: undisturbed, and while the node of one died."""

    def config(output: str) -> TrainConfig:
        return TrainConfig(
            features=features,
            output=f"{nodes.uri}/{output}",
            decoder=DecoderConfig(width=16, output_width=16, dropout=0.3),
            epochs=6,
            patience=None,
            num_workers=2,
            compute="float32",
        )

    undisturbed = timed(lambda: run_training(config("model")))
    disturbed = nodes.run_and_kill(
        lambda: run_training(config("model-killed")),
        lambda: any("checkpoint" in key for key in nodes.keys(f"model-killed/{WORK}/")),
        "RayTrainWorker",
        random.Random(2).uniform(0, 0.2),
    )
    report(
        "training, 2 workers",
        "node with a worker killed",
        "-",
        "-",
        (undisturbed, disturbed),
    )
    return config("model-killed").output


def test_training_survives_the_loss_of_a_node(nodes: Nodes, model: str) -> None:
    one, two = (
        safetensors.torch.load(storage.read_bytes(f"{uri}/weights.safetensors"))
        for uri in (f"{nodes.uri}/model", model)
    )
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-6)
    histories = [history(f"{nodes.uri}/model"), history(model)]
    assert [epoch["epoch"] for epoch in histories[1]] == [1, 2, 3, 4, 5, 6]
    for expected, found in zip(*histories, strict=True):
        assert found["validation_loss"] == pytest.approx(expected["validation_loss"], rel=1e-5)
        assert found["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-5)


def test_search_survives_the_loss_of_a_node(nodes: Nodes, features: str) -> None:
    """No trial is stopped early, so that which come first to a rung decides nothing."""

    def config(output: str) -> TuneConfig:
        return TuneConfig(
            features=features,
            output=f"{nodes.uri}/{output}",
            space="wide",
            num_samples=4,
            max_epochs=3,
            max_concurrent=2,
            scheduler="none",
        )

    found: list[SearchResult] = []
    undisturbed = timed(lambda: found.append(run_search(config("search"))))
    disturbed = nodes.run_and_kill(
        lambda: found.append(run_search(config("search-killed"))),
        lambda: any("checkpoint" in key for key in nodes.keys(f"search-killed/{WORK}/trials/")),
        "RayTrainWorker",
        random.Random(4).uniform(0, 0.2),
    )
    one, two = found
    numbers = [trial.number for trial in two.trials]
    lost = len(set(range(4)) - set(numbers))
    report(
        "tuning, 4 trials",
        "node with a trial's worker killed",
        str(lost),
        str(len(numbers) - len(set(numbers))),
        (undisturbed, disturbed),
    )
    assert numbers == [0, 1, 2, 3]
    assert two.best == one.best
    for expected, there in zip(one.trials, two.trials, strict=True):
        assert there.hyperparameters == expected.hyperparameters
        assert there.status == expected.status == "finished"
        assert [epoch for epoch, _ in there.curve] == [1, 2, 3]
        assert [value for _, value in there.curve] == pytest.approx(
            [value for _, value in expected.curve], rel=1e-4
        )


def history(model: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(
        io.BytesIO(storage.read_bytes(f"{model}/history.parquet"))
    ).to_pylist()
    return rows


def test_captioning_survives_the_loss_of_a_node(nodes: Nodes, photos: str, model: str) -> None:
    def config(output: str) -> CaptionConfig:
        return CaptionConfig(
            images=photos,
            model=model,
            output=f"{nodes.uri}/{output}",
            decode=DecodeOverrides(beam_size=2, max_length=10),
            batch_size=8,
        )

    undisturbed = timed(lambda: caption_collection(config("captions")))
    disturbed = nodes.run_and_kill(
        lambda: caption_collection(config("captions-killed")),
        lambda: finished_files(nodes, "captions-killed") > 0,
        "MapWorker",
        random.Random(3).uniform(0, 0.5),
    )
    uris = tuple(f"{config(name).output}/captions" for name in ("captions", "captions-killed"))
    expected, found = compare(
        "captioning", "node with a captioner killed", uris, (undisturbed, disturbed)
    )
    assert found["caption"].to_pylist() == expected["caption"].to_pylist()
    np.testing.assert_allclose(
        found["log_prob"].drop_null().to_numpy(),
        expected["log_prob"].drop_null().to_numpy(),
        rtol=1e-3,
        atol=1e-3,
    )


REQUESTS = 60


def test_service_survives_the_loss_of_a_node(nodes: Nodes, model: str) -> None:
    """Two replicas on two nodes; a client that asks again when it is told to, or cut off, gets every answer."""
    config = ServeConfig(
        model=(f"scenes={model}",),
        port=free_port(),
        decode=DecodeOverrides(beam_size=2, max_length=10),
        min_replicas=2,
        max_replicas=2,
        cpus_per_replica=1.0,
        http_replicas=2,
        threads=1,
    )
    pictures = [draw_scene(0, "validation", index) for index in range(SIZES["validation"])]
    answers: list[list[str]] = []
    repeated = 0

    def ask(number: int) -> str:
        nonlocal repeated
        deadline = time.monotonic() + 300
        while True:
            try:
                picture = pictures[number % len(pictures)]
                found = httpx.post(f"{url(config)}/v1/captions", content=picture, timeout=20)
                if found.status_code == 200:
                    return str(found.json()["captions"][0]["caption"])
            except httpx.TransportError:
                pass
            assert time.monotonic() < deadline, "no answer for five minutes"
            repeated += 1
            time.sleep(0.2)

    def ask_all() -> None:
        answers.append([])
        for number in range(REQUESTS):
            answers[-1].append(ask(number))

    deploy(config)
    try:
        undisturbed = timed(ask_all)
        assert repeated == 0
        disturbed = nodes.run_and_kill(
            ask_all,
            lambda: len(answers) == 2 and len(answers[1]) >= 10,
            "ServeReplica:captioner:model",
            0,
        )
    finally:
        serve.shutdown()
    lost = REQUESTS - len(answers[1])
    fault = f"node with a replica killed; {repeated} of {REQUESTS} requests asked again"
    report("serving, 2 replicas", fault, str(lost), "0", (undisturbed, disturbed))
    assert answers[1] == answers[0]
