"""Ray's private names are still there and still mean what is needed; what needs a running Ray is in tests/cluster."""

import os
import subprocess
import sys

import pytest
import ray
from ray._common.constants import HEAD_NODE_RESOURCE_NAME
from ray.data.checkpoint.checkpoint_writer import PENDING_CHECKPOINT_SUFFIX
from ray.train.v2._internal.constants import (
    CHECKPOINT_MANAGER_SNAPSHOT_FILENAME,
    ENABLE_PREEMPTION_WATCHER_ENV_VAR,
)

from captioner.runtime import ray_private

ADDRESS = "import ray; print(ray.util.get_node_ip_address())"


def test_alone_a_process_and_its_children_take_loopback_for_their_address() -> None:
    before = ray.util.get_node_ip_address(), dict(os.environ)
    with ray_private.alone():
        assert ray.util.get_node_ip_address() == "127.0.0.1"
        child = subprocess.run(
            [sys.executable, "-c", ADDRESS], capture_output=True, text=True, check=True
        )
        assert child.stdout == "127.0.0.1\n"
    assert (ray.util.get_node_ip_address(), dict(os.environ)) == before


def test_settings_of_a_local_ray_are_the_users_or_ours_and_end_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "7")
    monkeypatch.delenv("RAY_GCS_SERVER_PORT", raising=False)
    before = dict(os.environ)
    with ray_private.local_settings(1234):
        assert os.environ["RAY_GCS_SERVER_PORT"] == "1234"
        assert os.environ["RAY_ADDRESS"] == "127.0.0.1:1234"
        assert os.environ["RAY_raylet_start_wait_time_s"] == "7"
        assert os.environ[ENABLE_PREEMPTION_WATCHER_ENV_VAR] == "0"
        assert os.environ["GOMP_SPINCOUNT"] == "1000"
    assert dict(os.environ) == before
    monkeypatch.setenv("RAY_GCS_SERVER_PORT", "5678")
    with ray_private.local_settings(1234):
        assert os.environ["RAY_ADDRESS"] == "127.0.0.1:5678"


def test_names_are_those_that_ray_gives() -> None:
    assert ray_private.HEAD == HEAD_NODE_RESOURCE_NAME
    assert ray_private.CHECKPOINTS == CHECKPOINT_MANAGER_SNAPSHOT_FILENAME
    assert f"{PENDING_CHECKPOINT_SUFFIX}.parquet" == ray_private.PENDING
