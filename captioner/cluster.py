"""Starts Ray or joins the cluster that a job was submitted to."""

import logging
import os
from dataclasses import dataclass

import ray

logger = logging.getLogger(__name__)


def start_ray() -> None:
    """Join the cluster named by ``RAY_ADDRESS`` (set by ``ray job submit``), else start a local one.

    An explicit local start never attaches to an unrelated cluster that happens to run on this machine. Everything a
    local cluster opens listens on loopback only, behind Ray's token.
    """
    if ray.is_initialized():
        return
    quiet = {"logging_level": logging.WARNING, "log_to_driver": True}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(**quiet)
    else:
        ray.init(address="local", dashboard_host="127.0.0.1", **quiet)
    resources = ray.cluster_resources()
    logger.info("Ray: %d CPUs, %d GPUs", resources.get("CPU", 0), resources.get("GPU", 0))


def num_gpus() -> int:
    """GPUs of the whole cluster."""
    return int(ray.cluster_resources().get("GPU", 0))


def num_cpus() -> int:
    """Logical CPUs of the whole cluster."""
    return int(ray.cluster_resources().get("CPU", 1))


@dataclass(frozen=True)
class PoolPlan:
    """A pool of model actors: how many, and what each takes."""

    size: int
    num_cpus: float
    """Logical CPUs that one actor reserves."""
    num_gpus: float
    threads: int
    """Threads of one actor's tensor library. Ray would set one."""


def plan_pool(size: int | None = None, cpus_per_actor: int | None = None) -> PoolPlan:
    """Model actors for the cluster as it stands: one per GPU, else CPU actors of up to four cores.

    On CPU an eighth of each node's logical CPUs (at least one) stays unreserved for reading, decoding and writing; the
    actors' threads still cover all cores, for the system to share out, because those tasks need few of them.

    Args:
        size: number of actors, to override the plan.
        cpus_per_actor: threads of one actor on CPU, to override the plan.
    """
    gpus = num_gpus()
    if gpus:
        return PoolPlan(size or gpus, num_cpus=1, num_gpus=1, threads=1)
    nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    cpus = max([count for count in nodes if count > 0], default=1)
    available = max(1, cpus - max(1, cpus // 8))
    per_node = max(1, round(available / (cpus_per_actor or 4)))
    reserved = max(1, available // per_node)
    workers = sum(1 for count in nodes if count >= reserved + 1) or 1
    return PoolPlan(
        size or per_node * workers,
        num_cpus=reserved,
        num_gpus=0,
        threads=cpus_per_actor or -(-cpus // per_node),
    )
