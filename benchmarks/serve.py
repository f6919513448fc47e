"""How fast the service is here, and what it costs over its limit: the same Captioner called in a process of its own."""

import asyncio
import logging
import random
import socket
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager

import aiohttp
import numpy as np
import ray
from ray import serve

from benchmarks.config import BenchmarkServeConfig
from benchmarks.measurement import Measurement, Row
from captioner.artifacts.manifests import Record
from captioner.artifacts.models import open_any
from captioner.captioning.captioner import Captioner
from captioner.config import ServeConfig
from captioner.errors import ImageError, SourceError
from captioner.images.load import load_image
from captioner.runtime.cluster import num_cpus, num_gpus, start_ray
from captioner.runtime.device import prepare_device
from captioner.serving.run import deploy, url
from captioner.sources import open_source

logger = logging.getLogger(__name__)

_WARM_UP = 0.2  # of the time of a measurement


class Load(Record):
    """The service under one load. Latencies are those of the clients."""

    clients: int
    """Clients that each send one picture after another; 0: pictures sent at random times, at half the best rate."""
    images_per_second: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    mean_batch: float
    """Images in the forward pass of a request."""
    refused: int


class ServeBenchmark(Measurement):
    """Rates are images per second."""

    cpus: int
    gpus: int
    max_batch_size: int
    limit: float
    """Of the Captioner alone, on batches of ``max_batch_size``, loading included; measured before and after the
    service."""
    limits: list[float]
    loads: list[Load]
    half: Load
    """At half of the best rate."""
    best: float
    ratio: float
    """best / limit."""
    half_p99_over_single: float
    """99th percentile at half load, over the median latency of a lone client."""

    def table(self) -> str:
        """For a terminal."""
        names = ("images/s", "of limit", "p50 ms", "p95 ms", "p99 ms", "batch", "503")
        head = f"{'clients':>12}" + "".join(f"{name:>10}" for name in names)
        rows = [
            f"{one.clients or 'half load':>12}{one.images_per_second:>10.1f}{one.images_per_second / self.limit:>10.2f}"
            f"{one.p50_ms:>10.0f}{one.p95_ms:>10.0f}{one.p99_ms:>10.0f}{one.mean_batch:>10.1f}{one.refused:>10}"
            for one in [*self.loads, self.half]
        ]
        return "\n".join(
            [
                f"{self.cpus} CPUs, {self.gpus} GPUs; limit {self.limit:.1f} images/s in one process",
                head,
                *rows,
                f"best / limit {self.ratio:.2f}; p99 at half load / single {self.half_p99_over_single:.2f}",
            ]
        )

    def rows(self) -> Sequence[Row]:
        around = self.model_dump(include={"cpus", "gpus", "max_batch_size", "limit"})
        return [around | one.model_dump() for one in [*self.loads, self.half]]


def benchmark_serve(config: BenchmarkServeConfig) -> ServeBenchmark:
    """Measure on a Ray of this machine, started here.

    Raises:
        ModelError: the model directory is unusable.
        SourceError: there are no images that can be loaded.
    """
    pictures = _pictures(config)
    start_ray()
    cpus, gpus = num_cpus(), num_gpus()
    logger.info("the Captioner alone")
    limits = [_limit(config, pictures)]
    settings = ServeConfig(
        model=(f"model={config.model}",),
        port=_free_port(),
        decode=config.decode,
        max_batch_size=config.max_batch_size,
        max_queued=4 * max(config.concurrency),
        max_uploads=4 * max(config.concurrency),
    )
    with _service(settings) as address:
        loads = []
        for clients in config.concurrency:
            logger.info("%d clients", clients)
            loads.append(asyncio.run(_closed(address, pictures, clients, config.seconds)))
        best = max(one.images_per_second for one in loads)
        logger.info("half load")
        half = asyncio.run(_open(address, pictures, best / 2, 2 * config.seconds))
    logger.info("the Captioner alone, again")
    limits.append(_limit(config, pictures))
    limit = statistics.mean(limits)
    single = min(loads, key=lambda one: one.clients).p50_ms
    return ServeBenchmark(
        cpus=cpus,
        gpus=gpus,
        max_batch_size=config.max_batch_size,
        limit=limit,
        limits=limits,
        loads=loads,
        half=half,
        best=best,
        ratio=best / limit,
        half_p99_over_single=half.p99_ms / single,
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _pictures(config: BenchmarkServeConfig) -> list[bytes]:
    """Those of the files that the service would not refuse."""
    fit = open_any(config.model).fit
    source = open_source(config.images, config.source_options)
    found: list[bytes] = []
    left_out = 0
    for task in source.images().get_read_tasks(1):
        for table in task():
            for data in table["bytes"].to_pylist():
                try:
                    load_image(data or b"", fit)
                except ImageError:
                    left_out += 1
                else:
                    found.append(data)
    if left_out:
        logger.info("%d files cannot be loaded and are left out", left_out)
    if not found:
        raise SourceError(f"{config.images}: no image can be loaded")
    return found


@ray.remote(num_cpus=0)
class _Alone:
    """The Captioner in a process like a replica's, with nothing around it."""

    def __init__(self, config: BenchmarkServeConfig):
        self.captioner = Captioner.load(config.model, prepare_device())
        self.decode = self.captioner.opened.search(config.decode)
        self.config = config

    def rate(self, pictures: list[bytes]) -> float:
        size = self.config.max_batch_size
        done, started = 0, 0.0
        position = 0
        begin = time.perf_counter()
        while True:
            batch = [pictures[(position + one) % len(pictures)] for one in range(size)]
            position += size
            self.captioner.caption(batch, self.decode)
            now = time.perf_counter()
            if now - begin < _WARM_UP * self.config.seconds:
                started, done = now, 0
                continue
            started = started or begin
            done += size
            if now - begin > self.config.seconds:
                return done / (now - started)


def _limit(config: BenchmarkServeConfig, pictures: list[bytes]) -> float:
    alone = _Alone.options(num_gpus=min(1, num_gpus())).remote(config)  # type: ignore[attr-defined]
    rate = float(ray.get(alone.rate.remote(pictures)))
    ray.kill(alone)
    return rate


@contextmanager
def _service(settings: ServeConfig) -> Iterator[str]:
    deploy(settings)
    try:
        yield f"{url(settings)}/v1/captions"
    finally:
        serve.shutdown()


class _Watch:
    """Requests that began after the warm-up."""

    def __init__(self, address: str, session: aiohttp.ClientSession, seconds: float):
        self.address, self.session = address, session
        self.start = time.perf_counter()
        self.first = self.start + _WARM_UP * seconds
        self.end = self.first + seconds
        self.seconds = seconds
        self.latencies: list[float] = []
        self.batches: list[int] = []
        self.refused = self.finished = 0

    async def ask(self, picture: bytes) -> None:
        began = time.perf_counter()
        async with self.session.post(self.address, data=picture) as answer:
            body = await answer.json()
        now = time.perf_counter()
        if answer.status == 503:
            self.refused += 1
            await asyncio.sleep(float(answer.headers["Retry-After"]))
            return
        answer.raise_for_status()
        self.finished += self.first <= now <= self.end
        if self.first <= began <= self.end:
            self.latencies.append(1e3 * (now - began))
            self.batches.append(body["timing"]["batch_size"])

    def load(self, clients: int) -> Load:
        p50, p95, p99 = (float(one) for one in np.percentile(self.latencies, (50, 95, 99)))
        return Load(
            clients=clients,
            images_per_second=self.finished / self.seconds,
            p50_ms=p50,
            p95_ms=p95,
            p99_ms=p99,
            mean_batch=statistics.mean(self.batches),
            refused=self.refused,
        )


async def _measure(
    address: str, seconds: float, drive: Callable[[_Watch], Awaitable[None]]
) -> _Watch:
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        watch = _Watch(address, session, seconds)
        await drive(watch)
        return watch


async def _closed(address: str, pictures: list[bytes], clients: int, seconds: float) -> Load:
    async def client(watch: _Watch, number: int) -> None:
        position = number * len(pictures) // clients
        while time.perf_counter() < watch.end:
            position += 1
            await watch.ask(pictures[position % len(pictures)])

    async def drive(watch: _Watch) -> None:
        await asyncio.gather(*(client(watch, number) for number in range(clients)))

    return (await _measure(address, seconds, drive)).load(clients)


async def _open(address: str, pictures: list[bytes], rate: float, seconds: float) -> Load:
    """Pictures at random times (a Poisson process), whether or not earlier ones are answered."""
    generator = random.Random(0)

    async def drive(watch: _Watch) -> None:
        when, tasks = watch.start, []
        while when < watch.end:
            when += generator.expovariate(rate)
            await asyncio.sleep(max(0.0, when - time.perf_counter()))
            tasks.append(asyncio.create_task(watch.ask(generator.choice(pictures))))
        await asyncio.gather(*tasks)

    return (await _measure(address, seconds, drive)).load(0)
