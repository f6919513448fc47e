"""Metrics for Prometheus, through Ray: every node of the cluster exposes those of its processes."""

import http.client
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import ray
from ray.util import metrics

from captioner.runtime.progress import tag

PREFIX = "captioner_"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_IMAGES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
_NODE_TIMEOUT_S = 3.0


@dataclass(frozen=True)
class Metric:
    """A counter, or a histogram where there are boundaries."""

    name: str
    """Without ``ray_captioner_``, and without the ``_total`` of a counter."""
    text: str
    tags: tuple[str, ...]
    boundaries: tuple[float, ...] = ()


REQUESTS = Metric("requests", "HTTP requests answered", ("path", "method", "status"))
REJECTED = Metric("rejected", "Errors answered, by code", ("code",))
LATENCY = Metric(
    "request_latency_seconds", "From the headers of a request to its answer", ("path",), _SECONDS
)
LOAD = Metric("load_seconds", "Loading the images of a request", ("model",), _SECONDS)
QUEUE = Metric("queue_seconds", "Waiting for the model to be free", ("model",), _SECONDS)
ENCODER = Metric("encoder_seconds", "Encoder's part of a batch", ("model",), _SECONDS)
DECODER = Metric("decoder_seconds", "Decoder's part of a batch", ("model",), _SECONDS)
BATCH_SIZE = Metric("batch_size", "Images in a forward pass", ("model",), _IMAGES)
SERVICE = (REQUESTS, REJECTED, LATENCY, LOAD, QUEUE, ENCODER, DECODER, BATCH_SIZE)


# Made on first use: a metric belongs to the process that makes it.
@cache
def _counter(metric: Metric) -> metrics.Counter:
    return metrics.Counter(PREFIX + metric.name, metric.text, metric.tags)


@cache
def _histogram(metric: Metric) -> metrics.Histogram:
    return metrics.Histogram(
        PREFIX + metric.name, metric.text, list(metric.boundaries), metric.tags
    )


def count_request(path: str, method: str, status: int, seconds: float) -> None:
    _counter(REQUESTS).inc(tags={"path": path, "method": method, "status": str(status)})
    _histogram(LATENCY).observe(seconds, tags={"path": path})


def count_rejected(code: str) -> None:
    _counter(REJECTED).inc(tags={"code": code})


def observe(metric: Metric, model: str, value: float) -> None:
    """One of a model's histograms."""
    _histogram(metric).observe(value, tags={"model": tag(model)})


def exposition() -> str:
    """This service's metrics of all nodes, as Prometheus reads them; Ray's nodes report every few seconds.

    A node that does not answer is missing, and counted as ``captioner_nodes_missing``.

    Raises:
        OSError: no node answers.
    """
    nodes = [node for node in ray.nodes() if node["Alive"] and node["MetricsExportPort"]]
    urls = [f"http://{one['NodeManagerAddress']}:{one['MetricsExportPort']}/metrics" for one in nodes]  # fmt: skip
    return merge(read_all(urls))


def read_all(urls: Sequence[str]) -> list[str | OSError]:
    """What each of them says, or why there is nothing; all at once, and without a proxy that the environment names."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def read(url: str) -> str | OSError:
        try:
            with opener.open(url, timeout=_NODE_TIMEOUT_S) as answer:
                return str(answer.read().decode())
        except (OSError, http.client.HTTPException) as error:  # it died before or within its answer
            return OSError(str(error))

    with ThreadPoolExecutor(max(1, min(32, len(urls)))) as pool:
        return list(pool.map(read, urls))


def merge(texts: Sequence[str | OSError]) -> str:
    """
    Raises:
        OSError: there is nothing but errors.
    """
    errors = [one for one in texts if isinstance(one, OSError)]
    if errors and len(errors) == len(texts):
        raise errors[0]
    # Of all nodes the lines of a metric stand together, below its comments, which every node repeats.
    metrics: dict[str, dict[str, None]] = {}
    for text in texts:
        name = ""
        for line in text.splitlines() if isinstance(text, str) else ():
            if line.startswith(("# HELP ", "# TYPE ")):
                name = line.split()[2]
            if name and name in line:
                metrics.setdefault(name, {})[line] = None
    missing = f"ray_{PREFIX}nodes_missing"
    metrics[missing] = dict.fromkeys(
        (
            f"# HELP {missing} Nodes whose metrics cannot be read",
            f"# TYPE {missing} gauge",
            f"{missing} {len(errors)}",
        )
    )
    ours = (lines for name, lines in metrics.items() if name.startswith(f"ray_{PREFIX}"))
    return "".join(f"{line}\n" for lines in ours for line in lines)
