"""Every job on three nodes that share only a bucket: a node dies in its middle, and nothing is lost or repeated."""

import io
import random
import time
from typing import Any

import httpx
import numpy as np
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
    ServeConfig,
    TuneConfig,
)
from captioner.serving.run import deploy, url
from captioner.sources.scenes import draw_scene
from captioner.tuning.publish import SearchResult
from captioner.tuning.search import run_search
from tests.head import free_port
from tests.nodes.cluster import Nodes
from tests.nodes.comparison import BAD, IMAGES, SIZES, compare, report, timed

pytestmark = pytest.mark.timeout(1800)


def test_extraction_survives_the_loss_of_a_node(nodes: Nodes, features: str) -> None:
    manifest = storage.read_json(f"{features}/manifest.json")
    # The file with the captions is no picture.
    left_out = {"captions file": 1}
    counts = {
        "ok": sum(SIZES.values()),
        "rejected": len(BAD),
        "unreadable": 0,
        "left_out": left_out,
    }
    assert manifest["counts"] == counts
    assert counts["ok"] + counts["rejected"] == IMAGES
    captions = sum(split["captions"] for split in manifest["splits"].values())
    assert captions == 5 * (sum(SIZES.values()) - 1)
    listed = {file["path"] for file in manifest["files"]}
    there = {f"features/{key}" for key in nodes.keys("features-killed/features/") if key}
    assert there == {path for path in listed if path.startswith("features/")}


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


TRIALS = 3


def test_search_survives_the_loss_of_a_node(nodes: Nodes, features: str) -> None:
    """No trial is stopped early, so that which come first to a rung decides nothing."""

    def config(output: str) -> TuneConfig:
        return TuneConfig(
            features=features,
            output=f"{nodes.uri}/{output}",
            space="wide",
            num_samples=TRIALS,
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
    lost = len(set(range(TRIALS)) - set(numbers))
    report(
        f"tuning, {TRIALS} trials",
        "node with a trial's worker killed",
        str(lost),
        str(len(numbers) - len(set(numbers))),
        (undisturbed, disturbed),
    )
    assert numbers == list(range(TRIALS))
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
        lambda: nodes.finished_files("captions-killed") > 0,
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
