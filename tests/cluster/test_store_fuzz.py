"""A run that is stopped at a change of its store, twice, ends as if it had not been: a handful of many."""

import random
from collections.abc import Iterator

import pytest
import ray

from tests.cluster import store_fuzz
from tests.cluster.store_fuzz import World

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
