"""How many trainings fit a cluster, and which are refused before anything starts."""

from typing import Any

import pytest
import ray
from pydantic import ValidationError

from captioner.config import TrainConfig, TuneConfig
from captioner.errors import CaptionerError, ConfigError, OutOfReachError
from captioner.runtime.cluster import worker_slots
from captioner.tuning.search import trials_at_a_time


def cluster(patch: pytest.MonkeyPatch, *nodes: dict[str, float]) -> None:
    listed: list[dict[str, Any]] = [{"Alive": True, "Resources": node} for node in nodes]
    listed.append({"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}})
    patch.setattr(ray, "nodes", lambda: listed)
    total = {name: sum(node.get(name, 0) for node in nodes) for name in ("CPU", "GPU")}
    patch.setattr(ray, "cluster_resources", lambda: total)


@pytest.mark.parametrize(
    ("share", "nodes", "slots"),
    [
        (1.0, [{"CPU": 4}], 4),
        (1.0, [{}], 0),
        (1.0, [{}, {"CPU": 8, "GPU": 2}], 2),
        # Over the sum these would be five.
        (0.4, [{"CPU": 8, "GPU": 2}], 4),
        (0.4, [{"CPU": 8, "GPU": 1}, {"CPU": 8, "GPU": 1}], 4),
        (0.1, [{"CPU": 64, "GPU": 1}], 10),
        (1 / 3, [{"CPU": 8, "GPU": 2}], 6),
        # A worker takes a CPU, too.
        (0.25, [{"CPU": 2, "GPU": 1}], 2),
    ],
)
def test_slots_are_counted_by_gpu(
    share: float, nodes: list[dict[str, float]], slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster(monkeypatch, *nodes)
    assert worker_slots(share) == slots


@pytest.mark.parametrize("workers", [2, (1, 2)])
def test_workers_of_one_run_never_share_a_gpu(workers: Any) -> None:
    with pytest.raises(ValidationError, match=r"gpus_per_worker: 0.5 puts several of 2 workers"):
        TrainConfig(features="f", output="o", num_workers=workers, gpus_per_worker=0.5)
    TrainConfig(features="f", output="o", num_workers=1, gpus_per_worker=0.5)
    with pytest.raises(ValidationError, match=r"gpus_per_trial: 0.5 puts several of 2 workers"):
        TuneConfig(features="f", output="o", workers_per_trial=2, gpus_per_trial=0.5)


def test_trials_of_several_workers_share_the_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    base = TuneConfig(features="f", output="o")
    cluster(monkeypatch, {"CPU": 7})
    assert trials_at_a_time(base, 12) == 7
    assert trials_at_a_time(base.model_copy(update={"workers_per_trial": 2}), 12) == 3
    assert trials_at_a_time(base.model_copy(update={"workers_per_trial": 2}), 2) == 2
    assert trials_at_a_time(base.model_copy(update={"max_concurrent": 2}), 12) == 2


@pytest.mark.parametrize(
    ("nodes", "workers", "error", "message"),
    [
        ([{}], 1, OutOfReachError, "the Ray cluster has no CPU for a trial yet"),
        ([{"CPU": 3}], 4, ConfigError, "4 need as many CPUs, the cluster has 3"),
        ([{"CPU": 8, "GPU": 1}], 2, ConfigError, "2 need as many GPUs, the cluster has 1"),
    ],
)
def test_a_cluster_without_room_for_a_trial_says_so(
    nodes: list[dict[str, float]],
    workers: int,
    error: type[CaptionerError],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster(monkeypatch, *nodes)
    config = TuneConfig(features="f", output="o", workers_per_trial=workers)
    with pytest.raises(error, match=message):
        trials_at_a_time(config, 12)
