"""What a running pipeline takes: images done, memory, object store; sampled twice a second."""

import os
import shutil
import subprocess
import threading
import time
from dataclasses import dataclass, field

import psutil
import ray

from captioner.runtime.cluster import beside_driver
from captioner.runtime.progress import Ticker, start_counter
from captioner.runtime.ray_private import object_store

_SECONDS = 0.5


@dataclass(frozen=True)
class Sample:
    when: float
    """Seconds."""
    done: int
    """Images."""


@dataclass
class Memory:
    """Peak resident bytes, without shared memory, of processes on the driver's node."""

    driver: int = 0
    model_actor: int = 0
    """The largest."""
    task_worker: int = 0
    """The largest of those that read, load and write."""


@dataclass
class Watch:
    """Context manager that samples while its block runs. Processes are those of the driver's node."""

    samples: list[Sample] = field(default_factory=list)
    memory: Memory = field(default_factory=Memory)
    object_store: int = 0
    """Peak bytes in the cluster's object store."""
    spilled: int = 0
    """Bytes spilled to disk meanwhile."""

    def __post_init__(self) -> None:
        self.counter = start_counter()
        self._before = object_store().spilled
        raylet = _raylet_pid.options(scheduling_strategy=beside_driver()).remote()
        self._raylet = psutil.Process(ray.get(raylet))
        self._actors: set[int] = set()
        self._ticker = Ticker(self._sample, _SECONDS)

    def __enter__(self) -> "Watch":
        self._ticker.__enter__()
        self._gpus = GpuUtilisation().__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._gpus.__exit__()
        self._ticker.__exit__()
        ray.kill(self.counter)

    def steady(self, images: int) -> float:
        """Images per second in the middle of a run of ``images``, between a fifth and nine tenths of them."""
        first, last = self._middle(images)
        return (last.done - first.done) / max(1e-9, last.when - first.when)

    def gpu_utilisation(self, images: int) -> float | None:
        """Share of that time in which the GPUs of the driver's node computed, as NVML has it; None without any."""
        first, last = self._middle(images)
        return self._gpus.mean(first.when, last.when)

    def _middle(self, images: int) -> tuple[Sample, Sample]:
        inside = [one for one in self.samples if 0.2 * images <= one.done <= 0.9 * images]
        if len(inside) < 2 or inside[-1].done == inside[0].done:
            # Too few images for a middle: the whole, from the first finished batch on.
            inside = [one for one in self.samples if one.done]
        return inside[0], inside[-1]

    def _sample(self) -> None:
        done, _ = ray.get(self.counter.read.remote())
        self.samples.append(Sample(time.perf_counter(), done))
        store = object_store()
        self.object_store = max(self.object_store, store.used)
        self.spilled = store.spilled - self._before
        self.memory.driver = max(self.memory.driver, _resident(psutil.Process()))
        for worker in self._raylet.children():
            try:
                title = worker.cmdline()[0]
                if any(name in title for name in ("_StageActor", "TrainWorker", "TrainController")):
                    self._actors.add(worker.pid)
                elif not title.startswith("ray::"):
                    continue
                kind = "model_actor" if worker.pid in self._actors else "task_worker"
                setattr(self.memory, kind, max(getattr(self.memory, kind), _resident(worker)))
            except (psutil.Error, IndexError):
                continue  # it ended meanwhile


class GpuUtilisation:
    """Context manager: ``nvidia-smi``, which comes with the driver, says how busy the GPUs of this machine are."""

    def __init__(self) -> None:
        self._samples: list[tuple[float, float]] = []

    def __enter__(self) -> "GpuUtilisation":
        self._process: subprocess.Popen[str] | None = None
        if shutil.which("nvidia-smi") is None:
            return self
        self._process = subprocess.Popen(
            [
                *("nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"),
                f"--loop-ms={int(1000 * _SECONDS)}",
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, args=[self._process], daemon=True)
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._reader.join()

    def mean(self, start: float, end: float) -> float | None:
        """Share of the time between two moments (of ``time.perf_counter``) in which GPUs were busy, their mean."""
        inside = [share for when, share in self._samples if start <= when <= end]
        return sum(inside) / len(inside) if inside else None

    def _read(self, process: "subprocess.Popen[str]") -> None:
        for line in process.stdout or ():
            # Where a GPU does not tell: [N/A].
            if line.strip().isdecimal():
                self._samples.append((time.perf_counter(), int(line) / 100))


@ray.remote(num_cpus=0)
def _raylet_pid() -> int:
    return os.getppid()


def _resident(process: psutil.Process) -> int:
    memory = process.memory_info()
    return int(memory.rss - memory.shared)
