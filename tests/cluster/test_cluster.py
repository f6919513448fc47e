"""How small a cluster may be, and what its workers are told of S3."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from captioner.config import EncoderConfig, ExtractConfig, ShapesConfig, SourceConfig
from captioner.errors import ConfigError
from captioner.features.extract import extract
from captioner.runtime import cluster
from tests.cluster.conftest import SECRETS
from tests.head import ROOT

pytestmark = pytest.mark.timeout(600)

DRIVER = """
import json, os, ray
from captioner.runtime.cluster import start_ray
start_ray()
print(json.dumps(ray.get(ray.remote(lambda: dict(os.environ)).remote())))
"""


@pytest.fixture
def one_cpu() -> Iterator[None]:
    ray.shutdown()
    cluster.start_local_ray(num_cpus=1, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def test_a_cluster_of_one_cpu_is_refused_in_one_line(one_cpu: None, tmp_path: Path) -> None:
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


def test_workers_get_the_address_of_s3_and_no_secret(local_ray: None) -> None:
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
