"""A run that is stopped at a change of its store, twice, ends as if it had not been: a handful of many."""

import os
import random
import subprocess
import sys
from collections.abc import Iterator

import pytest
import ray

from captioner.features.extract import extract
from tests.cluster import store_fuzz
from tests.cluster.store_fuzz import World
from tests.head import ROOT

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    ray.shutdown()  # that of the module before knows of no S3
    with store_fuzz.world(tmp_path_factory.mktemp("world")) as found:
        yield found


@pytest.mark.parametrize(
    ("job", "store", "seed"),
    [
        ("extract", "local", 0),
        ("extract", "s3", 1),
        ("caption-jsonl", "s3", 2),
        ("train", "local", 3),
    ],
)
def test_a_run_that_is_stopped_at_any_change_of_its_store_ends_as_undisturbed(
    world: World, job: str, store: str, seed: int
) -> None:
    _, changes = store_fuzz.undisturbed(world, job, store)
    generator = random.Random(seed)
    store_fuzz.check(world, job, store, [generator.randrange(changes) for _ in range(2)])


WITHOUT_LEASE = (
    "import sys; from captioner.artifacts import output; output.take = lambda *_: None\n"
    "from captioner.config import ExtractConfig; from captioner.features.extract import extract\n"
    "extract(ExtractConfig.model_validate_json(sys.argv[1]))"
)


def test_two_drivers_whom_no_lease_keeps_apart_break_nothing(world: World) -> None:
    """Each deletes what the other has begun and does its rows again; the next command publishes at the latest."""
    config = world.config("extract", f"{world.bucket}/two-drivers")
    both = [
        subprocess.Popen(
            [sys.executable, "-c", WITHOUT_LEASE, config.model_dump_json()],
            cwd=ROOT,
            env=os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for _ in range(2)
    ]
    for driver in both:
        driver.wait(timeout=300)
    extract(config)
    expected, _ = store_fuzz.undisturbed(world, "extract", "s3")
    assert store_fuzz.differing(store_fuzz.published(config.output), expected) == []
