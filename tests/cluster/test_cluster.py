"""How small a cluster may be, and what its workers are told."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.util.state import get_actor

from captioner.artifacts.tables import feature_rows
from captioner.config import EncoderConfig, ExtractConfig, ShapesConfig, SourceConfig
from captioner.encoders.spec import FeatureShape
from captioner.errors import ConfigError
from captioner.features.extract import extract
from captioner.features.pipeline import rows_per_file
from captioner.runtime import cluster
from captioner.storage import S3_ADDRESS_VARIABLES
from tests.head import ROOT

pytestmark = pytest.mark.timeout(600)

SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
DRIVER = """
import json, os, ray
from captioner.runtime.cluster import start_ray
start_ray()
print(json.dumps(ray.get(ray.remote(lambda: dict(os.environ)).remote())))
"""


@pytest.fixture(autouse=True)
def no_ray_left() -> Iterator[None]:
    yield
    ray.shutdown()


def test_a_machine_of_one_core_gets_two_logical_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(cluster, "num_cores", lambda: 1)
    cluster.start_ray()
    assert cluster.num_cpus() == 2
    # Actors for both, and yet room for a task and for Ray Data's filter.
    pool = cluster.plan_pool(7_000)
    assert (pool.size, pool.num_gpus, pool.threads) == (2, 0, 1)
    few = cluster.plan_pool(200)
    assert (few.size, few.threads) == (1, 2)
    asked = cluster.plan_pool(200, size=3, cpus_per_actor=2)
    assert (asked.size, asked.threads) == (3, 2)
    assert pool.size * pool.num_cpus + cluster.TASK_CPUS + 1 <= 2.001


def test_a_cluster_of_one_cpu_is_refused_in_one_line(tmp_path: Path) -> None:
    cluster.start_local_ray(num_cpus=1, include_dashboard=False, log_to_driver=False)
    config = ExtractConfig(
        source="shapes",
        source_options=SourceConfig(shapes=ShapesConfig(train=1, validation=1, test=1)),
        output=str(tmp_path / "features"),
        encoder=EncoderConfig(weights="random"),
    )
    with pytest.raises(ConfigError, match=r"has 1 CPU, and a pipeline needs 2 ") as one:
        extract(config)
    assert "\n" not in str(one.value)
    assert list(tmp_path.iterdir()) == []


def test_processes_of_a_local_ray_know_which_ray_is_theirs() -> None:
    """Ray Train's cleaner asks for the state of an actor; beside another Ray it must not ask that one, nor give up."""
    other = subprocess.Popen(
        [sys.executable, "-c", "from captioner.runtime.cluster import start_local_ray as s; s(); print('up'); input()"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "up\n"
        cluster.start_local_ray(num_cpus=2, include_dashboard=True, log_to_driver=False)

        @ray.remote
        class Asker:
            def state_of_itself(self) -> str:
                found = get_actor(ray.get_runtime_context().get_actor_id(), timeout=30)
                return "unknown" if found is None else found.state

        assert ray.get(Asker.remote().state_of_itself.remote()) == "ALIVE"
    finally:
        other.communicate("\n", timeout=60)


def test_workers_get_the_address_of_s3_and_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*S3_ADDRESS_VARIABLES, *SECRETS):
        monkeypatch.delenv(name, raising=False)
    cluster.start_local_ray(num_cpus=2, include_dashboard=False, log_to_driver=False)
    address = {"AWS_ENDPOINT_URL": "http://store:9000", "AWS_REGION": "eu-north-1"}
    # As ray job submit hands a job its runtime environment, whose variables the driver then has, too.
    submitted = {"runtime_env": {"env_vars": {"AWS_REGION": "eu-north-1", "OTHER": "x"}}}
    driver = subprocess.run(
        [sys.executable, "-c", DRIVER],
        cwd=ROOT,
        env=os.environ
        | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
        | {"RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps(submitted), "OTHER": "x"}
        | address
        | dict.fromkeys(SECRETS, "something"),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=120,
    )
    seen = json.loads(driver.stdout)
    assert seen.items() >= (address | {"OTHER": "x"}).items()
    assert seen.keys().isdisjoint(SECRETS)


def test_large_stores_have_about_a_thousand_files_that_fit_in_memory() -> None:
    vectors, grids = (
        feature_rows(FeatureShape(2048, 2048, 7, 7), grid=grid) for grid in (False, True)
    )
    assert rows_per_file(7_000, vectors) == 7
    assert rows_per_file(10, vectors) == 1
    assert rows_per_file(10_000_000, vectors) == 10_000
    assert rows_per_file(10_000_000, grids) * (4 * 2048 + 2 * 49 * 2048) <= 128 * 2**20
