"""Three nodes that share a bucket, and what the jobs made of the pictures in it while a node died."""

import json
import random
from collections.abc import Iterator

import numpy as np
import pytest
import ray
from ray.cluster_utils import Cluster

from captioner import storage
from captioner.artifacts.output import WORK
from captioner.config import DecoderConfig, EncoderConfig, ExtractConfig, TrainConfig
from captioner.features.extract import extract
from captioner.runtime.cluster import start_ray
from captioner.sources.scenes import draw_scene, make_scene
from captioner.training.run import TrainResult, run_training
from tests.nodes.cluster import BUCKET, FOLDER, Nodes
from tests.nodes.comparison import BAD, ROWS, SIZES, compare, report, timed
from tests.s3 import CREDENTIALS, S3Server, clients_of


@pytest.fixture(scope="package")
def nodes(s3_server: S3Server) -> Iterator[Nodes]:
    """The nodes have credentials in their environment; where the bucket is they learn from the driver."""
    with pytest.MonkeyPatch.context() as patch:
        for name in storage.S3_ADDRESS_VARIABLES:
            patch.delenv(name, raising=False)
        for name, value in CREDENTIALS.items():
            patch.setenv(name, value)
        head = {"num_cpus": 0, "object_store_memory": 2 * 10**8, "include_dashboard": False}
        found = Nodes(Cluster(initialize_head=True, head_node_args=head), f"s3://{BUCKET}/{FOLDER}")
        patch.setenv("RAY_ADDRESS", found.cluster.address)
        with clients_of(s3_server, BUCKET):
            try:
                found.add_node()
                found.add_node()
                start_ray()
                yield found
            finally:
                ray.shutdown()
                found.cluster.shutdown()


@pytest.fixture(scope="package")
def photos(nodes: Nodes) -> str:
    """Pictures, all but one with captions, and three files that are none."""
    folder, listed = f"{nodes.uri}/photos", []
    for split, size in SIZES.items():
        for index in range(size):
            name = f"{split}-{index:03d}.png"
            storage.write_bytes(f"{folder}/{name}", draw_scene(0, split, index))
            none = (split, index) == ("validation", 0)
            captions = [] if none else make_scene(0, split, index).captions()
            sentences = [{"raw": text} for text in captions]
            listed.append({"filename": name, "split": split, "sentences": sentences})
    whole = draw_scene(0, "train", 0)
    for name, data in zip(BAD, (whole[: len(whole) // 2], b"", b"not a picture"), strict=True):
        storage.write_bytes(f"{folder}/{name}", data)
    dataset = json.dumps({"images": listed, "dataset": "scenes"}).encode()
    storage.write_bytes(f"{folder}/dataset_scenes.json", dataset)
    return folder


def extraction(photos: str, output: str) -> ExtractConfig:
    return ExtractConfig(
        source=photos,
        output=output,
        encoder=EncoderConfig(weights="random", layer="layer3", compute="float32"),
        max_reject_fraction=0.05,
        batch_size=8,
    )


@pytest.fixture(scope="package")
def features(nodes: Nodes, photos: str) -> str:
    """A feature store, made twice: undisturbed, and while a node died. Checked here, as the other jobs read it."""

    def config(output: str) -> ExtractConfig:
        return extraction(photos, f"{nodes.uri}/{output}")

    undisturbed = timed(lambda: extract(config("features")))
    disturbed = nodes.run_and_kill(
        lambda: extract(config("features-killed")),
        lambda: nodes.finished_files("features-killed") > 0,
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


@pytest.fixture(scope="package")
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

    found: list[TrainResult] = []
    undisturbed = timed(lambda: found.append(run_training(config("model"))))
    assert run_training(config("model")) == found[0]
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


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The table of benchmarks/README.md."""
    if ROWS:
        terminalreporter.section("nodes lost")
        head = ("job", "fault", "lost rows", "repeated rows", "undisturbed", "with the fault")
        for row in (head, ("---",) * len(head), *ROWS):
            terminalreporter.write_line(f"| {' | '.join(row)} |")
