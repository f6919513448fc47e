"""How small a cluster may be, what is kept of a run on it, and what its workers are told of S3."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from captioner.artifacts.output import WORK, Output
from captioner.artifacts.tables import feature_rows
from captioner.encoders.spec import FeatureShape
from captioner.errors import OutOfReachError
from captioner.features.pace import MOST_ROWS
from captioner.features.pipeline import run_pipeline
from captioner.features.row_marks import CHECKPOINT, finish_rows, finished
from captioner.features.stage import PIXELS, Stage
from captioner.runtime import cluster
from captioner.runtime.progress import ProgressLine
from captioner.sources import open_source
from tests.cluster.conftest import SECRETS
from tests.head import ROOT
from tests.sources import write_images

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


class Watcher(Stage):
    """Stands in for an encoder, and notes each id with how many files are complete by then."""

    loaded = pa.schema([pa.field(PIXELS, pa.fixed_shape_tensor(pa.uint8(), [64, 64, 3]))])

    def __init__(self, output: Path, log: Path, fails_after: int | None):
        self.marks, self.log, self.fails_after = output / f"{WORK}/{CHECKPOINT}", log, fails_after

    def load(self, data: bytes) -> dict[str, Any]:
        return {PIXELS: np.zeros((64, 64, 3), np.uint8)}

    def prepare(self) -> None:
        self.encoded = 0

    def __call__(self, batch: pa.Table) -> pa.Table:
        for name in batch["image_id"].to_pylist():
            complete = len([mark for mark in self.marks.iterdir() if "pending" not in mark.name])
            with self.log.open("a") as file:
                file.write(f"{name} {complete}\n")
            self.encoded += 1
            if self.encoded == self.fails_after:
                raise RuntimeError("enough")
            time.sleep(0.003)
        vectors = np.zeros((len(batch), 4), np.float32)
        return pa.table({"pooled": pa.FixedShapeTensorArray.from_numpy_ndarray(vectors)})


def test_on_one_cpu_files_are_written_all_along_and_nothing_finished_is_read_again(
    one_cpu: None, tmp_path: Path
) -> None:
    images = 1600
    photos = tmp_path / "photos"
    write_images(photos, *(f"{number:04d}.jpg" for number in range(images)))
    schema = feature_rows(FeatureShape(4, 4, 1, 1), grid=False, thumbnails=False)
    pool = cluster.plan_pool(images)

    def run(log: Path, fails_after: int | None = None) -> list[tuple[str, int]]:
        with Output(str(tmp_path / "out"), {"job": "test"}) as output:
            run_pipeline(
                open_source(str(photos)),
                output,
                "features",
                schema,
                Watcher(tmp_path / "out", log, fails_after),
                batch_size=32,
                pool=pool,
            )
            finish_rows(output, "features", images)
        return [(name, int(files)) for name, files in map(str.split, log.read_text().splitlines())]

    with pytest.raises(ray.exceptions.RayTaskError):
        run(tmp_path / "first", fails_after=1000)
    with Output(str(tmp_path / "out"), {"job": "test"}) as output:
        done = finished(output)
    first = [name for name, _ in map(str.split, (tmp_path / "first").read_text().splitlines())]
    # Each picture that was encoded but for those of some tasks lies in a file.
    assert 1000 - 5 * MOST_ROWS <= len(done) <= len(first) < images
    second = run(tmp_path / "second")
    assert len(second) == len({name for name, _ in second}) == images - len(done)
    assert not done.holds([name for name, _ in second]).any()
    # Of as many as 600: where writing waits for reading, the first file comes with the last picture.
    assert second[-1][1] - second[0][1] >= 3
    rows = pq.read_table(tmp_path / "out/features", columns=["image_id", "error"])
    assert len(set(rows["image_id"].to_pylist())) == len(rows) == rows["error"].null_count == images


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


@pytest.mark.usefixtures("local_ray")
def test_actors_that_only_end_end_the_block_that_waits_for_them() -> None:
    def only_end() -> None:
        with ProgressLine(10, actors=2) as progress:
            for _ in range(11):
                progress.counter.start.remote()
            time.sleep(60)

    with pytest.raises(OutOfReachError, match=r"have ended 5 times each, .*/logs has what they"):
        only_end()
    # The same number is well where something is done in between.
    with ProgressLine(10, actors=2) as progress:
        for _ in range(6):
            progress.counter.start.remote()
        progress.counter.add.remote(1, 0)
        for _ in range(6):
            progress.counter.start.remote()
        assert ray.get(progress.counter.starts_in_vain.remote()) == 6
