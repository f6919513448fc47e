"""Progress of a long Ray Data job in one readable line: images done, rate, rejected so far, time left."""

import logging
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util import metrics

from captioner.errors import OutOfReachError
from captioner.runtime import ray_private
from captioner.runtime.cluster import beside_driver
from captioner.runtime.screen import SCREEN

# So often every actor may start without a row handled by any.
_TRIES = 5

IMAGES = ("images_total", "Images handled")
REJECTED_IMAGES = ("rejected_images_total", "Images rejected")


class Ticker:
    """Context manager that calls ``tick`` every ``seconds``, on a thread of its own, and once more at the end."""

    def __init__(self, tick: Callable[[], None], seconds: float = 1.0):
        self._tick, self._seconds = tick, seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Ticker":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._tick()

    def _run(self) -> None:
        while not self._stop.wait(self._seconds):
            self._tick()


@ray.remote(num_cpus=0)
class Counter:
    """Counts rows that the actors of a job have handled. For people to look at, never for bookkeeping: a retried
    task counts its rows again.

    Also exported, as ``ray_captioner_images_total`` and ``ray_captioner_rejected_images_total``, to whatever scrapes
    the cluster's metrics.
    """

    def __init__(self) -> None:
        self.done = 0
        self.rejected = 0
        self.starts = 0
        self._images, self._refused = (
            metrics.Counter(f"captioner_{name}", text) for name, text in (IMAGES, REJECTED_IMAGES)
        )

    def start(self) -> None:
        """An actor begins, for the first time or because it has ended."""
        self.starts += 1

    def starts_in_vain(self) -> int:
        """Since rows were last handled."""
        return self.starts

    def add(self, done: int, rejected: int) -> None:
        self.starts = 0
        self.done += done
        self.rejected += rejected
        # Ray's counters refuse to count nothing.
        for counter, count in ((self._images, done), (self._refused, rejected)):
            if count:
                counter.inc(count)

    def read(self) -> tuple[int, int]:
        return self.done, self.rejected


def start_counter() -> ActorHandle:
    """A ``Counter`` on the driver's node."""
    return Counter.options(scheduling_strategy=beside_driver()).remote()  # type: ignore[attr-defined]


class ProgressLine:
    """Context manager that shows the state of a ``Counter`` while a block runs, in a line that passes by.

    Ray starts actors that have ended again, however often: where they only end, it ends the block.
    """

    def __init__(
        self,
        total: int,
        already: int = 0,
        noun: str = "images",
        counter: ActorHandle | None = None,
        *,
        actors: int,
    ):
        """
        Args:
            counter: a Counter that the caller keeps and reads too; default: one of this line's own.
            actors: how many tell the counter of their starts.
        """
        self._most_starts = _TRIES * actors
        self._is_in_vain = False
        self.total, self.already, self.noun = total, already, noun
        self._own = counter is None
        self.counter: ActorHandle = start_counter() if counter is None else counter
        self._ticker = Ticker(self._show)
        self._closing = False
        self._first: tuple[float, int] | None = None

    def __enter__(self) -> "ProgressLine":
        self._ticker.__enter__()
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        """
        Raises:
            OutOfReachError: in the place of the interrupt that ended the block because actors only end.
        """
        self._closing = True
        self._ticker.__exit__()
        if self._own:
            ray.kill(self.counter)
        if self._is_in_vain and isinstance(error, KeyboardInterrupt):
            raise OutOfReachError(
                f"the processes with the network in them have ended {_TRIES} times each, and done nothing in between: "
                f"is there memory for as many? {ray_private.logs()} has what they said; the same command goes on"
            ) from None

    def _show(self) -> None:
        try:
            (done, rejected), starts = ray.get(
                [self.counter.read.remote(), self.counter.starts_in_vain.remote()], timeout=10
            )
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
            return  # the counter's node died or is busy; the job itself is not affected
        SCREEN.pass_by(self.describe(done, rejected, time.monotonic()), last=self._closing)
        if starts > self._most_starts and not self._is_in_vain:
            self._is_in_vain = True
            # What a shell has started in its background ignores the first.
            ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            number = signal.SIGTERM if ignored else signal.SIGINT
            signal.pthread_kill(threading.main_thread().ident or 0, number)

    def describe(self, done: int, rejected: int, now: float) -> str:
        """The line for a state; the rate counts from the first finished batch, so start-up does not dilute it."""
        parts = [f"{self.already + done:,} of {self.total:,} {self.noun}"]
        if done and self._first is None:
            self._first = (now, done)
        if self._first and now > self._first[0] and done > self._first[1]:
            rate = (done - self._first[1]) / (now - self._first[0])
            left = max(0, self.total - self.already - done) / rate
            parts += [f"{rate:,.1f} {self.noun}/s", f"{int(left // 60)}:{int(left % 60):02d} left"]
        elif not done:
            parts.append("starting")
        if rejected:
            parts.append(f"{rejected:,} rejected")
        return " | ".join(parts)


def tag(value: str) -> str:
    """A name or path as the value of a metric's tag, which Ray wants in ASCII."""
    return value.encode("ascii", "backslashreplace").decode()


class TrainingGauges:
    """Context manager that exports a training run's last epoch to whatever scrapes the cluster's metrics, from the
    worker that knows it.

    Values are set again and again: Ray forgets a gauge twenty seconds after it was last set, and an epoch takes longer.
    """

    NAMES = {
        "epoch": "Epochs done",
        "captions_per_second": "Captions trained on per second, over all workers",
        "validation_loss": "Nats per target token under teacher forcing",
        "data_wait_fraction": "Share of the time spent waiting for batches",
    }

    def __init__(self, run: str):
        """
        Args:
            run: the model's directory, the value of the tag ``run``.
        """
        self._run = run
        self._gauges = {
            name: metrics.Gauge(f"captioner_training_{name}", text, tag_keys=("run",))
            for name, text in self.NAMES.items()
        }
        self._values: dict[str, float] = {}
        self._ticker = Ticker(self._refresh, seconds=5.0)

    def __enter__(self) -> "TrainingGauges":
        self._ticker.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._ticker.__exit__()

    def set(self, epoch: dict[str, Any]) -> None:
        """Values of one epoch, by field."""
        self._values = {name: float(epoch[name]) for name in self._gauges}
        self._refresh()

    def _refresh(self) -> None:
        for name, value in self._values.items():
            self._gauges[name].set(value, {"run": tag(self._run)})


@ray.remote(num_cpus=0)
class Mailbox:
    """Lines that workers want shown by the driver: those that stay, and the last of those that pass by."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.passing = ""

    def put(self, line: str) -> None:
        self.lines.append(line)
        self.passing = ""

    def put_passing(self, line: str) -> None:
        self.passing = line

    def take(self) -> tuple[list[str], str]:
        lines, self.lines = self.lines, []
        return lines, self.passing


class MessageLog:
    """Context manager that shows, in the driver, the lines that workers put into ``actor``."""

    def __init__(self, target: logging.Logger):
        mailbox = Mailbox.options(scheduling_strategy=beside_driver())  # type: ignore[attr-defined]
        self.actor: ActorHandle = mailbox.remote()
        self._target = target
        self._ticker = Ticker(self._drain)

    def __enter__(self) -> "MessageLog":
        SCREEN.wait_for("starting the workers")
        self._ticker.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._ticker.__exit__()
        SCREEN.pass_by("", last=True)
        ray.kill(self.actor)

    def _drain(self) -> None:
        try:
            lines, passing = ray.get(self.actor.take.remote(), timeout=10)
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
            return  # lines are for people to look at; training goes on without them
        if lines:
            SCREEN.pass_by("", last=True)
        for line in lines:
            self._target.info(line)
        if passing:
            SCREEN.pass_by(passing)
