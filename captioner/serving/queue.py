"""What waits for a model: batches as full as the load makes them, and no promise that cannot be kept.

Times are those of ``time.monotonic``.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

from captioner.serving.errors import ErrorCode, RequestError

Item = TypeVar("Item")
Result = TypeVar("Result")

# What a run counts for when the next is over: five runs decide, and a hiccup is soon forgotten.
_KEEP = 0.8
# A batch takes so much of a request's time at most: one waits for the batch before its own, and for its own.
_SHARE = 0.25
# The pace varies: what would be done at the last moment is refused at once rather than too late.
_CAUTION = 1.25
_FAILURES = 3


class Work(NamedTuple):
    """What a picture takes, or several: passes through the encoder, and ``DecodeConfig.work`` of the search."""

    pictures: float
    words: float


class Pace:
    """Seconds that a unit of work takes, the mean over the last runs; nothing until there was one."""

    def __init__(self) -> None:
        self._seconds = self._units = 0.0

    def note(self, seconds: float, units: float) -> None:
        self._seconds = _KEEP * self._seconds + seconds
        self._units = _KEEP * self._units + units

    def seconds(self, units: float) -> float:
        return units * self._seconds / self._units if self._units else 0.0


class Ran(NamedTuple, Generic[Result]):
    """A batch that went through the model."""

    results: Sequence[Result]
    encoder_s: float
    decoder_s: float


class Answer(NamedTuple, Generic[Result]):
    """What came of one item."""

    result: Result
    began: float
    """When its batch did."""
    batch_size: int


class Abandoned(Exception):
    """Raised within a run: nobody waits for any of its results."""


@dataclass
class _Waiting(Generic[Item, Result]):
    item: Item
    work: Work
    deadline: float
    future: "asyncio.Future[Answer[Result]]" = field(default_factory=asyncio.Future)

    def given_up(self, now: float) -> bool:
        return self.future.done() or now >= self.deadline


class ModelQueue(Generic[Item, Result]):
    """Runs a function of many items on one thread, and gives it whatever waits each time it is free.

    A lone item never waits for company, and under load batches are as full as the load makes them. Ray Serve's own
    ``serve.batch`` closes a batch by a clock while the previous one still runs: short waits give small batches under
    load, long ones make lone requests wait.

    Requests that could not be answered in time are refused before anything is done for them, by the pace of the last
    batches; what has expired all the same is dropped before it is computed. So overload costs no throughput.
    """

    def __init__(
        self,
        run: Callable[[list[Item]], Ran[Result]],
        *,
        max_batch_size: int,
        max_requests: int = 128,
        max_bytes: int = 2**40,
        timeout_s: float = 30.0,
    ):
        """
        Args:
            run: called on a thread of its own, one batch after another.
            max_requests, max_bytes: that are let in at once.
            timeout_s: what requests are usually given.
        """
        self._run, self._max_batch_size = run, max_batch_size
        self._max_requests, self._max_bytes = max_requests, max_bytes
        self._batch_s = _SHARE * timeout_s
        self._waiting: deque[_Waiting[Item, Result]] = deque()
        self._running: list[_Waiting[Item, Result]] = []
        self._ahead = Work(0.0, 0.0)
        self._requests = self._bytes = self._failures = 0
        self._began = self._stepped = self._last_s = 0.0
        self._failure = ""
        self._encoder, self._decoder = Pace(), Pace()
        self._thread = ThreadPoolExecutor(1, "model")
        self._wake = asyncio.Event()
        self._loop_task: asyncio.Task[None] | None = None

    @contextmanager
    def admit(self, work: Work, size: int, deadline: float, ready_s: float = 0.0) -> Iterator[None]:
        """While the block runs, a request of so much work and so many bytes counts as one that is let in.

        Args:
            ready_s: seconds until it can be submitted.

        Raises:
            RequestError: it cannot be answered before its deadline, or there is no room for it.
        """
        now = time.monotonic()
        ahead = self._left(now)
        # Its own batch may take as long as the last one, whose items it shares it with.
        takes = _CAUTION * (max(ahead, ready_s) + max(self._seconds(work), self._last_s))
        late = now + takes - deadline
        full = self._requests >= self._max_requests or self._bytes + size > self._max_bytes
        # Where nothing else is to be done it is tried, however long it seems to take: the pace may be wrong.
        if self._requests and (full or late > 0):
            raise RequestError(ErrorCode.OVERLOADED, retry_after_s=max(late, ahead / 4))
        self._requests += 1
        self._bytes += size
        self._add(work, 1)
        try:
            yield
        finally:
            self._requests -= 1
            self._bytes -= size
            self._add(work, -1)

    async def submit(
        self, items: Sequence[Item], work: Work, deadline: float
    ) -> list[Answer[Result]]:
        """What comes of the items of a request that was let in.

        Args:
            work: of each of them.

        Raises:
            RequestError: its time was over before its turn came.
        """
        if self._loop_task is None:
            self._loop_task = asyncio.create_task(self._work())
        new: list[_Waiting[Item, Result]] = [_Waiting(item, work, deadline) for item in items]
        self._waiting += new
        self._wake.set()
        try:
            return await asyncio.gather(*(one.future for one in new))
        finally:
            for one in new:  # where one of them failed nobody waits for the others
                one.future.cancel()

    def step(self) -> None:
        """To be called by ``run`` at every word: it advances.

        Raises:
            Abandoned: nobody waits for any result of this batch.
        """
        now = time.monotonic()
        self._stepped = now
        if self._running and all(one.given_up(now) for one in self._running):
            raise Abandoned

    def trouble(self, patience_s: float) -> str | None:
        """Why this queue will not advance by itself: its batch has made no step for so long, or every batch fails."""
        stood = time.monotonic() - self._stepped
        if self._running and stood > patience_s:
            return f"the model has made no step for {stood:.0f} s"
        if self._failures >= _FAILURES:
            return f"the last {self._failures} batches failed ({self._failure})"
        if self._loop_task is not None and self._loop_task.done():
            return "the queue has ended"
        return None

    def _seconds(self, work: Work) -> float:
        return self._encoder.seconds(work.pictures) + self._decoder.seconds(work.words)

    def _left(self, now: float) -> float:
        """Seconds of work that is let in."""
        done = min(now - self._began, self._seconds(_total(self._running))) if self._running else 0
        return max(0.0, self._seconds(self._ahead) - done)

    def _add(self, work: Work, sign: int) -> None:
        pictures, words = self._ahead
        self._ahead = Work(pictures + sign * work.pictures, words + sign * work.words)

    def _take(self) -> list[_Waiting[Item, Result]]:
        """The next batch: the first that wait, as many as are done in a share of a request's time, without those that
        then come too late."""
        now = time.monotonic()
        alive: list[_Waiting[Item, Result]] = []
        for one in self._waiting:
            if not one.given_up(now):
                alive.append(one)
            elif not one.future.done():
                one.future.set_exception(RequestError(ErrorCode.OVERLOADED))
        while True:
            batch: list[_Waiting[Item, Result]] = []
            for one in alive[: self._max_batch_size]:
                if batch and self._seconds(_total([*batch, one])) > self._batch_s:
                    break
                batch.append(one)
            end = now + self._seconds(_total(batch))
            late = [one for one in batch if end > one.deadline]
            if not late or len(late) == len(alive):  # the last resort is tried
                break
            for one in late:
                one.future.set_exception(RequestError(ErrorCode.OVERLOADED))
            alive = [one for one in alive if not one.future.done()]
        self._waiting = deque(alive[len(batch) :])
        return batch

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = self._take()
            if not batch:
                self._wake.clear()
                await self._wake.wait()
                continue
            self._began = self._stepped = began = time.monotonic()
            self._running = batch
            work = _total(batch)
            try:
                items = [one.item for one in batch]
                ran = await loop.run_in_executor(self._thread, self._run, items)
                answers = list(zip(batch, ran.results, strict=True))
            except Abandoned:
                # As much as is known of how long it takes.
                self._decoder.note(time.monotonic() - began, work.words)
                self._fail(batch, RequestError(ErrorCode.OVERLOADED))
                continue
            except Exception as error:  # handed to every caller, who would wait for ever otherwise
                self._failures += 1
                self._failure = " ".join(repr(error).split())[:200]
                self._fail(batch, error)
                continue
            finally:
                self._running = []
            self._failures = 0
            self.note(work, ran)
            self._last_s = min(self._batch_s, time.monotonic() - began)
            for one, result in answers:
                if not one.future.done():
                    one.future.set_result(Answer(result, began, len(batch)))

    def note(self, work: Work, ran: Ran[Result]) -> None:
        """Learn the pace from a run."""
        self._encoder.note(ran.encoder_s, work.pictures)
        self._decoder.note(ran.decoder_s, work.words)

    def _fail(self, batch: list[_Waiting[Item, Result]], error: Exception) -> None:
        for one in batch:
            if not one.future.done():
                one.future.set_exception(error)


def _total(batch: Sequence[_Waiting[Item, Result]]) -> Work:
    return Work(
        math.fsum(one.work.pictures for one in batch), math.fsum(one.work.words for one in batch)
    )
