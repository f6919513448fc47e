"""Ray's private names in a running Ray: they do what is needed of them."""

import os

import numpy as np
import pytest
import ray
from ray.train.v2._internal.execution.scaling_policy.autoscaling_coordinator_client import (
    TrainAutoscalingCoordinatorClient,
)

from captioner.runtime import ray_private

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


def test_the_object_store_is_measured() -> None:
    before = ray_private.object_store()
    held = ray.put(np.zeros(50 * 2**20, np.uint8))
    after = ray_private.object_store()
    assert 50 * 2**20 <= after.used - before.used < 60 * 2**20
    assert after.spilled == before.spilled == 0
    del held
