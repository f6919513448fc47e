"""Starts Ray or joins the cluster that a job was submitted to."""

import contextlib
import logging
import os
import secrets
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants

logger = logging.getLogger(__name__)


def start_ray() -> None:
    """Join the cluster named by ``RAY_ADDRESS`` (set by ``ray job submit``), else start a local one."""
    if ray.is_initialized():
        return
    if os.environ.get("RAY_ADDRESS"):
        ray.init(logging_level=logging.WARNING)
    else:
        start_local_ray(logging_level=logging.WARNING)
    resources = ray.cluster_resources()
    logger.info("Ray: %d CPUs, %d GPUs", resources.get("CPU", 0), resources.get("GPU", 0))


def start_local_ray(**options: Any) -> None:
    """Start Ray on this machine, listening on 127.0.0.1 alone, behind Ray's token.

    It never attaches to an unrelated cluster that happens to run here.

    Args:
        options: passed on to ``ray.init``.
    """
    if os.environ.get("RAY_AUTH_MODE", "token") == "token":
        _create_token()
    # On Linux Ray replaces 127.0.0.1 by the machine's own address, on which everybody can call it, unless it is told,
    # as on macOS, that this node will never be one of several. Its processes inherit the variable; children of ours
    # that start later must not.
    variable = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
    before = os.environ.get(variable), ray_constants.ENABLE_RAY_CLUSTER
    os.environ[variable], ray_constants.ENABLE_RAY_CLUSTER = "0", False
    try:
        ray.init(address="local", dashboard_host="127.0.0.1", **options)
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before[1]
        if before[0] is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before[0]


def _create_token() -> None:
    """Create Ray's token file for its owner alone; Ray would leave its mode to the umask."""
    if {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        return
    path = Path.home() / ".ray" / "auth_token"
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent) as file:  # mode 0600
        file.write(secrets.token_hex(32))
        file.flush()
        with contextlib.suppress(FileExistsError):
            os.link(file.name, path)
    path.chmod(0o600)


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
