"""Metrics for Prometheus, through Ray: every node of the cluster exposes those of its processes."""

import urllib.request
from functools import cache

import ray
from ray.util.metrics import Counter, Histogram

from captioner.runtime.progress import tag

PREFIX = "captioner_"
_SECONDS = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0]
_IMAGES = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0]


# Made on first use: a metric belongs to the process that makes it.
@cache
def _requests() -> Counter:
    return Counter(f"{PREFIX}requests", "HTTP requests answered", ("path", "method", "status"))


@cache
def _latency() -> Histogram:
    name = f"{PREFIX}request_latency_seconds"
    return Histogram(name, "From the headers of a request to its answer", _SECONDS, ("path",))


@cache
def _rejected() -> Counter:
    return Counter(f"{PREFIX}rejected", "Requests refused, by error code", ("code",))


@cache
def _batch_size() -> Histogram:
    return Histogram(f"{PREFIX}batch_size", "Images in a forward pass", _IMAGES, ("model",))


def count_request(path: str, method: str, status: int, seconds: float) -> None:
    _requests().inc(tags={"path": path, "method": method, "status": str(status)})
    _latency().observe(seconds, tags={"path": path})


def count_rejected(code: str) -> None:
    _rejected().inc(tags={"code": code})


def observe_batch(model: str, images: int) -> None:
    _batch_size().observe(images, tags={"model": tag(model)})


def exposition() -> str:
    """This service's metrics of all nodes, as Prometheus reads them. Ray's nodes report every few seconds."""
    lines: dict[str, None] = {}  # a set that keeps the order: nodes repeat the comment lines
    for node in ray.nodes():
        if node["Alive"] and node["MetricsExportPort"]:
            url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
            with urllib.request.urlopen(url, timeout=5) as answer:
                text = answer.read().decode()
            lines |= dict.fromkeys(line for line in text.splitlines() if f"ray_{PREFIX}" in line)
    return "\n".join(lines) + "\n"
