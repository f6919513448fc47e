"""Dynamic batches: as full as the load makes them, none delayed, nobody left waiting."""

import asyncio
import threading
import time

import pytest

from captioner.serving.batcher import Batcher


def test_lone_item_does_not_wait_and_crowds_fill_batches() -> None:
    sizes: list[int] = []

    def run(items: list[int]) -> list[int]:
        sizes.append(len(items))
        time.sleep(0.05)
        return [2 * item for item in items]

    async def ask() -> None:
        batcher = Batcher(run, max_size=8)
        started = time.perf_counter()
        assert (await batcher.submit(1))[0] == 2
        assert time.perf_counter() - started < 0.2
        results = await asyncio.gather(*(batcher.submit(item) for item in range(20)))
        assert [result for result, _, _ in results] == [2 * item for item in range(20)]
        assert {size for _, _, size in results} <= {8, 4}

    asyncio.run(ask())
    assert sizes == [1, 8, 8, 4]


def test_items_given_up_are_left_out() -> None:
    release = threading.Event()
    seen: list[int] = []

    def run(items: list[int]) -> list[int]:
        release.wait(5)
        seen.extend(items)
        return items

    async def ask() -> None:
        batcher = Batcher(run, max_size=1)
        tasks = [asyncio.create_task(batcher.submit(item)) for item in range(3)]
        await asyncio.sleep(0.05)
        tasks[1].cancel()
        release.set()
        assert (await tasks[2])[0] == 2

    asyncio.run(ask())
    assert seen == [0, 2]


def test_failure_reaches_every_caller_and_the_next_batch_runs() -> None:
    def run(items: list[int]) -> list[int]:
        if 0 in items:
            raise ValueError("no memory")
        return items

    async def ask() -> None:
        batcher = Batcher(run, max_size=4)
        both = await asyncio.gather(batcher.submit(0), batcher.submit(1), return_exceptions=True)
        assert [str(one) for one in both] == ["no memory", "no memory"]
        assert (await batcher.submit(5))[0] == 5

    asyncio.run(ask())


def test_results_that_are_missing_are_an_error() -> None:
    async def ask() -> None:
        batcher: Batcher[int, int] = Batcher(lambda items: [], max_size=4)
        with pytest.raises(ValueError, match="shorter"):
            await asyncio.wait_for(batcher.submit(1), 5)

    asyncio.run(ask())
