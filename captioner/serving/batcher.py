"""Dynamic batches: as full as the load makes them."""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Batcher(Generic[Item, Result]):
    """Runs a function of many items on one thread, and gives it whatever waits each time it is free.

    A lone item never waits for company, and under load batches are as full as the load makes them. Ray Serve's own
    ``serve.batch`` closes a batch by a clock while the previous one still runs: short waits give small batches under
    load, long ones make lone requests wait.
    """

    def __init__(self, run: Callable[[list[Item]], Sequence[Result]], max_size: int):
        self._run, self._max_size = run, max_size
        self._waiting: asyncio.Queue[tuple[Item, asyncio.Future[tuple[Result, float, int]]]] = (
            asyncio.Queue()
        )
        self._thread = ThreadPoolExecutor(1, "model")
        self._loop_task: asyncio.Task[None] | None = None

    async def submit(self, item: Item) -> tuple[Result, float, int]:
        """The result for one item, when its batch began (of ``time.perf_counter``), and the size of that batch."""
        if self._loop_task is None:
            self._loop_task = asyncio.create_task(self._work())
        future: asyncio.Future[tuple[Result, float, int]] = asyncio.Future()
        self._waiting.put_nowait((item, future))
        return await future

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = [await self._waiting.get()]
            while len(batch) < self._max_size and not self._waiting.empty():
                batch.append(self._waiting.get_nowait())
            # Of requests that were given up the future is cancelled.
            batch = [(item, future) for item, future in batch if not future.done()]
            if not batch:
                continue
            started = time.perf_counter()
            try:
                items = [item for item, _ in batch]
                results = await loop.run_in_executor(self._thread, self._run, items)
                answers = list(zip(batch, results, strict=True))
            except Exception as error:  # handed to every caller, who would wait for ever otherwise
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, future), result in answers:
                if not future.done():
                    future.set_result((result, started, len(batch)))
