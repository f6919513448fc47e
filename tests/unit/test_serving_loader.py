"""Images of requests are loaded in processes of their own, within a budget."""

import asyncio
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from captioner.config import ImageLimits
from captioner.errors import OutOfReachError
from captioner.images.fence import Fence
from captioner.images.load import Fit, load_image
from captioner.serving.errors import ErrorCode, RequestError
from captioner.serving.loader import Budget, Loader
from tests.pictures import bomb, picture

FIT = Fit((64, 64))


def later() -> float:
    return time.monotonic() + 60


def test_images_are_loaded_as_everywhere_and_refused_with_their_place() -> None:
    loader = Loader(FIT, ImageLimits(max_bytes=100_000), 2**30)
    kinds = [picture(0), picture(1, "WEBP"), picture(2, "PNG")]
    found = asyncio.run(loader.load_all(kinds, [None] * 3, later()))
    for data, one in zip(kinds, found, strict=True):
        expected = load_image(data, FIT)
        np.testing.assert_array_equal(one.pixels, expected.pixels)
        assert one.box == expected.box
    for data, code in (
        (picture(0, size=(400, 300))[:-400], ErrorCode.NOT_AN_IMAGE),
        (b"text", ErrorCode.TYPE_NOT_ALLOWED),
        (bomb(), ErrorCode.IMAGE_TOO_LARGE),
    ):
        with pytest.raises(RequestError) as refused:
            asyncio.run(loader.load_all([picture(0), data], ["a", "b"], later()))
        assert refused.value.code is code
        assert "image 2 of 2 (b)" in str(refused.value)
    with pytest.raises(RequestError) as late:
        asyncio.run(loader.load_all([picture(0)], [None], time.monotonic() - 1))
    assert late.value.code is ErrorCode.OVERLOADED


def abort_on_short(data: bytes) -> dict[str, Any]:
    if len(data) < 10:
        os.abort()
    return {"pixels": np.zeros((1, 1, 3), np.uint8), "box": [0.0, 0.0, 1.0, 1.0]}


def test_picture_that_kills_is_refused_and_the_others_are_loaded() -> None:
    loader = Loader(FIT, ImageLimits(), 2**30)
    loader._fence = Fence(abort_on_short)
    loader._fit = FIT
    poison = picture(0)[:9]  # a JPEG by its first bytes

    async def all_at_once() -> list[Any]:
        requests = [[picture(1)], [poison], [picture(2)], [picture(3)]]
        tasks = [loader.load_all(images, [None], later()) for images in requests]
        return await asyncio.gather(*tasks, return_exceptions=True)

    first, killed, *others = asyncio.run(all_at_once())
    assert all(isinstance(one, list) for one in (first, *others))
    assert isinstance(killed, RequestError)
    assert killed.code is ErrorCode.NOT_AN_IMAGE


def test_what_has_waited_too_long_for_memory_is_not_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loader = Loader(FIT, ImageLimits(), 2**30)
    loaded: list[object] = []
    monkeypatch.setattr(loader._fence, "load", loaded.append)
    with ThreadPoolExecutor(1) as pool:
        with loader._budget.hold(2**30):
            waiting = pool.submit(loader.load, picture(0), time.monotonic() + 0.2)
            time.sleep(0.4)
        found = waiting.result()
    assert isinstance(found, RequestError)
    assert found.code is ErrorCode.OVERLOADED
    assert not loaded


def test_machine_without_room_is_a_busy_one(monkeypatch: pytest.MonkeyPatch) -> None:
    loader = Loader(FIT, ImageLimits(), 2**30)

    def none_starts(_: object) -> None:
        raise OutOfReachError("no process for loading pictures starts: is memory short?")

    monkeypatch.setattr(loader._fence, "load", none_starts)
    with pytest.raises(RequestError) as refused:
        asyncio.run(loader.load_all([picture(0)], [None], later()))
    assert refused.value.code is ErrorCode.OVERLOADED


def test_budget_is_never_exceeded_and_the_largest_gets_its_turn() -> None:
    budget = Budget(10)
    lock, held, most = threading.Lock(), 0, 0

    def take(amount: int) -> None:
        nonlocal held, most
        with budget.hold(amount):
            with lock:
                held += min(amount, 10)
                most = max(most, held)
            time.sleep(0.002)
            with lock:
                held -= min(amount, 10)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(take, [3, 7, 4, 1, 100, 2, 9, 5] * 8))
    assert held == 0
    assert 7 <= most <= 10
