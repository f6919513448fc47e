"""Ray's private names in a running Ray: they do what is needed of them."""

import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
from ray.train.v2._internal.execution.scaling_policy.autoscaling_coordinator_client import (
    TrainAutoscalingCoordinatorClient,
)

from captioner.runtime import ray_private
from captioner.runtime.data_context import data_context

pytestmark = pytest.mark.usefixtures("local_ray")


def test_processes_of_a_local_ray_are_told_its_address() -> None:
    address = ray.get_runtime_context().gcs_address
    assert address.startswith("127.0.0.1:")
    assert ray.get(ray.remote(lambda: os.environ["RAY_ADDRESS"]).remote()) == address


def test_the_coordinator_that_train_asks_is_the_one_that_was_started() -> None:
    ray_private.start_autoscaling_coordinator()
    asked = TrainAutoscalingCoordinatorClient("test")._autoscaling_coordinator
    started = ray.get_actor("AutoscalingCoordinator", namespace="AutoscalingCoordinator")
    assert asked._actor_id == started._actor_id


class Same:
    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return batch


def test_a_dataset_is_cut_as_it_is_steered(tmp_path: Path) -> None:
    begun: list[bool] = []
    tasks: list[int] = []
    files: list[int] = []

    def is_task_full(rows: int) -> bool:
        tasks.append(rows)
        return rows >= 10

    def is_file_full(rows: int) -> bool:
        files.append(rows)
        return rows >= 40

    steering = ray_private.Steering(
        begins=lambda: begun.append(True),
        block_bytes=lambda: 5 * 8,
        is_task_full=is_task_full,
        is_file_full=is_file_full,
    )
    with data_context() as context:
        ray_private.steer(context, steering)
        rows = ray.data.range(200, override_num_blocks=1).map_batches(
            lambda batch: batch, num_cpus=0.5
        )
        rows = rows.map_batches(Same, compute=ray.data.ActorPoolStrategy(size=1), num_cpus=0.1)
        rows.write_parquet(str(tmp_path))
    assert begun == [True]
    # Loaded five rows at a time, encoded ten, written forty.
    assert (max(tasks), max(files)) == (10, 40)
    written = [pq.read_metadata(file).num_rows for file in tmp_path.iterdir()]
    assert written == [40] * 5


def test_the_object_store_is_measured() -> None:
    before = ray_private.object_store()
    held = ray.put(np.zeros(50 * 2**20, np.uint8))
    after = ray_private.object_store()
    assert 50 * 2**20 <= after.used - before.used < 60 * 2**20
    assert after.spilled == before.spilled == 0
    del held
