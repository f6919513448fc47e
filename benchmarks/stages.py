"""The stages of extraction alone, each with nothing else to do: loading on all CPUs, encoding on all actors."""

import contextlib
import statistics
import time

import pyarrow as pa
import ray
from ray import cloudpickle

from captioner.errors import ImageError
from captioner.features.loading import load_rows
from captioner.features.stage import Stage
from captioner.images.fence import Fence
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
def _load_for(sample: pa.Table, stage: Stage, seconds: float) -> float:
    """Images per second of one CPU."""
    done, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        done += len(load_rows(sample, stage, digests=True))
    return done / (time.perf_counter() - started)


def load_rate(sample: pa.Table, stage: Stage, seconds: float) -> float:
    """Images per second that all CPUs of the cluster load."""
    shared = ray.put(sample)
    # Started and thrown away first: a worker's start-up must not count against the others.
    ray.get([_load_for.remote(shared, stage, 0.1) for _ in range(num_cpus())])
    return float(
        sum(ray.get([_load_for.remote(shared, stage, seconds) for _ in range(num_cpus())]))
    )


@ray.remote(num_cpus=1)
def _passes(sample: pa.Table, stage: Stage, seconds: float) -> list[tuple[float, float]]:
    """Seconds that one CPU takes for the sample with the fence and without, in turns."""
    pictures = [cell.as_buffer() for cell in sample["bytes"] if cell.is_valid]
    fence = Fence(cloudpickle.dumps(stage.load), memory=stage.loading_bytes)
    fence.load(pictures)
    found = []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        begun = time.perf_counter()
        fence.load(pictures)
        fenced = time.perf_counter()
        for picture in pictures:
            with contextlib.suppress(ImageError):
                stage.load(picture.to_pybytes())
        found.append((fenced - begun, time.perf_counter() - fenced))
    return found


def fence_cost(sample: pa.Table, stage: Stage, seconds: float) -> float:
    """Share by which loading takes longer in child processes, median over passes on one CPU."""
    passes = ray.get(_passes.remote(sample, stage, seconds))
    return float(statistics.median(fenced / bare for fenced, bare in passes)) - 1


class _Model:
    """A model actor on its own."""

    def __init__(self, stage: Stage):
        stage.prepare()
        self.stage = stage

    def rate(self, batch: pa.Table, seconds: float) -> float:
        done, started = 0, time.perf_counter()
        while time.perf_counter() - started < seconds:
            done += len(self.stage(batch))
        return done / (time.perf_counter() - started)


def model_rate(
    sample: pa.Table, batch_size: int, seconds: float, stage: Stage, pool: PoolPlan
) -> float:
    """Images per second of all encoder actors, on images that are loaded already."""
    loaded = load_rows(sample.slice(0, batch_size), stage)
    repeated = pa.array([row % len(loaded) for row in range(batch_size)])
    batch = pa.table(
        {
            name: pa.ExtensionArray.from_storage(
                kind, column.combine_chunks().storage.take(repeated)
            )
            if isinstance(kind := column.type, pa.ExtensionType)
            else column.take(repeated)
            for name, column in zip(loaded.column_names, loaded.columns, strict=True)
        }
    )
    build = ray.remote(num_cpus=pool.num_cpus, num_gpus=pool.num_gpus)(_Model)
    actors = [build.remote(stage) for _ in range(pool.size)]
    ray.get([actor.rate.remote(batch, 1.0) for actor in actors])
    rate = float(sum(ray.get([actor.rate.remote(batch, seconds) for actor in actors])))
    for actor in actors:
        ray.kill(actor)
    return rate
