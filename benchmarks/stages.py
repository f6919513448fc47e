"""The stages of extraction alone, each with nothing else to do: loading on all CPUs, encoding on all actors."""

import time
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from captioner.config import ImageLimits
from captioner.features.extract import EncodeImages
from captioner.features.pipeline import PIXELS, load_rows
from captioner.runtime.cluster import PoolPlan, num_cpus
from captioner.sources.base import Source

_SAMPLE = 64


def take_sample(source: Source) -> pa.Table:
    """A few images of a source, encoded."""
    tables: list[pa.Table] = []
    for task in source.images().get_read_tasks(1):
        tables += task.read_fn()
        if sum(map(len, tables)) >= _SAMPLE:
            break
    return pa.concat_tables(tables).slice(0, _SAMPLE)


@ray.remote(num_cpus=1)
def _load_for(sample: pa.Table, seconds: float) -> float:
    """Images per second of one CPU."""
    done, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        done += len(load_rows(sample, ImageLimits()))
    return done / (time.perf_counter() - started)


def load_rate(sample: pa.Table, seconds: float) -> float:
    """Images per second that all CPUs of the cluster load."""
    shared = ray.put(sample)
    # Started and thrown away first: a worker's start-up must not count against the others.
    ray.get([_load_for.remote(shared, 0.1) for _ in range(num_cpus())])
    return float(sum(ray.get([_load_for.remote(shared, seconds) for _ in range(num_cpus())])))


class _Model:
    """An encoder actor on its own."""

    def __init__(self, options: dict[str, Any]):
        self.stage = EncodeImages(**options)

    def rate(self, images: np.ndarray[Any, Any], seconds: float) -> float:
        rows = pa.table({"image_id": [str(number) for number in range(len(images))]})
        done, started = 0, time.perf_counter()
        while time.perf_counter() - started < seconds:
            done += len(self.stage(rows, images))
        return done / (time.perf_counter() - started)


def model_rate(
    sample: pa.Table, batch_size: int, seconds: float, options: dict[str, Any], pool: PoolPlan
) -> float:
    """Images per second of all encoder actors, on images that are loaded already."""
    pixels = load_rows(sample.slice(0, batch_size), ImageLimits())[PIXELS].combine_chunks()
    images = np.array(pixels.to_numpy_ndarray())
    images = np.resize(images, (batch_size, *images.shape[1:]))
    build = ray.remote(num_cpus=pool.num_cpus, num_gpus=pool.num_gpus)(_Model)
    actors = [build.remote(options) for _ in range(pool.size)]
    ray.get([actor.rate.remote(images, 1.0) for actor in actors])
    rate = float(sum(ray.get([actor.rate.remote(images, seconds) for actor in actors])))
    for actor in actors:
        ray.kill(actor)
    return rate
