"""Starts Ray or joins the cluster that a job was submitted to."""

import logging
import os

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
