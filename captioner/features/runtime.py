"""How the encoders of a run run: measured once, where the number of pictures could repay it."""

import logging

import ray

from captioner.config import Runtime
from captioner.encoders.spec import EncoderSpec
from captioner.runtime.cluster import TASK_CPUS, PoolPlan
from captioner.runtime.device import prepare_device
from captioner.sources.outage import patiently

logger = logging.getLogger(__name__)

# Of fewer images an encoder no runtime is measured.
_LEAST_IMAGES = 1500


def choose_runtime(
    weights_uri: str, spec: EncoderSpec, images: int, pool: PoolPlan, retry_seconds: float
) -> Runtime:
    """How the encoders of a pool run, measured on one of the cluster's nodes where so many images could repay it.

    Raises:
        OutOfReachError: the weights cannot be had now.
    """
    each = images // pool.size
    if pool.num_gpus or each < _LEAST_IMAGES:
        return "eager"
    # In a process of its own, which keeps no tensor library afterwards.
    measure = ray.remote(num_cpus=TASK_CPUS, max_calls=1)(_measure)
    runtime: Runtime
    runtime, reason = ray.get(measure.remote(weights_uri, spec, each, pool.threads, retry_seconds))
    if reason:
        logger.info("the encoder is not compiled, which could make it faster: %s", reason)
    return runtime


def _measure(
    weights_uri: str, spec: EncoderSpec, images: int, threads: int, retry_seconds: float
) -> tuple[Runtime, str | None]:
    from captioner.encoders import runtime
    from captioner.encoders.encoder import Encoder

    device = prepare_device("cpu", threads=threads)
    encoder = patiently(retry_seconds, lambda: Encoder.load(weights_uri, spec, device))
    return runtime.choose_runtime(encoder, images)
