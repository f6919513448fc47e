"""The way from the API to the replicas: one that dies, one that refuses, one that hangs."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, NodeDiedError, ObjectLostError, WorkerCrashedError

from captioner.config import DecodeConfig, ServeConfig
from captioner.serving.errors import ErrorCode, RequestError
from captioner.serving.guard import GuardSettings
from captioner.serving.ingress import CaptionApi
from captioner.serving.messages import CaptionParameters, CaptionResponse, Timing
from captioner.serving.uploads import Upload
from tests.api import card

ANSWER = CaptionResponse(
    model="first",
    version="v",
    captions=[],
    timing=Timing(load_ms=1, wait_ms=1, model_ms=1, batch_size=1),
)
UPLOAD = Upload([b"x"], [None], CaptionParameters())

Replica = Callable[[], AsyncIterator[Any]]


class Stream:
    """A replica's response."""

    def __init__(self, steps: AsyncIterator[Any]):
        self._steps, self.cancelled = steps, False

    def __aiter__(self) -> AsyncIterator[Any]:
        return self._steps

    def cancel(self) -> None:
        self.cancelled = True


class Handle:
    """Of replicas that answer one after another."""

    def __init__(self, *replicas: Replica):
        self.left, self.streams, self.seconds = list(replicas), list[Stream](), list[float]()
        self.caption = self

    def options(self, *, stream: bool) -> "Handle":
        assert stream
        return self

    def remote(self, *arguments: Any) -> Stream:
        self.seconds.append(arguments[-1])
        self.streams.append(Stream(self.left.pop(0)()))
        return self.streams[-1]


async def good() -> AsyncIterator[Any]:
    yield None
    yield ANSWER


async def dies_loading() -> AsyncIterator[Any]:
    raise ActorDiedError
    yield


async def dies_later() -> AsyncIterator[Any]:
    yield None
    raise ActorDiedError


async def full() -> AsyncIterator[Any]:
    yield RequestError(ErrorCode.OVERLOADED, retry_after_s=7)


async def hangs() -> AsyncIterator[Any]:
    yield None
    await asyncio.sleep(60)


def api(handle: Handle, seconds: float = 30) -> CaptionApi:
    config = ServeConfig(model=("first=x",), request_timeout_s=seconds)
    return CaptionApi(config, GuardSettings(), {"first": card("first")}, {"first": handle})  # type: ignore[dict-item]


def ask(handle: Handle, seconds: float = 30) -> CaptionResponse:
    return asyncio.run(api(handle, seconds).caption("first", UPLOAD, DecodeConfig()))


def test_answer_comes_from_the_first_replica() -> None:
    handle = Handle(good)
    assert ask(handle).version == "v"
    assert handle.seconds[0] == pytest.approx(30, abs=1)


def test_request_whose_replica_died_is_asked_once_more_within_its_time() -> None:
    async def dies_late() -> AsyncIterator[Any]:
        yield None
        await asyncio.sleep(0.3)
        raise ActorDiedError

    handle = Handle(dies_late, good)
    assert ask(handle).version == "v"
    assert handle.seconds[1] < handle.seconds[0] - 0.25
    twice = Handle(dies_later, dies_later, good)
    with pytest.raises(RequestError) as error:
        ask(twice)
    assert error.value.code is ErrorCode.OVERLOADED
    assert len(twice.left) == 1


@pytest.mark.parametrize(
    "lost", [WorkerCrashedError(), NodeDiedError("gone"), ObjectLostError("", ("", 0, ""), "")]
)
def test_answer_lost_with_its_node_is_asked_for_once_more(lost: Exception) -> None:
    def replica(loads: bool) -> Replica:
        async def loses() -> AsyncIterator[Any]:
            if loads:
                yield None
            raise lost

        return loses

    assert ask(Handle(replica(True), good)).version == "v"
    with pytest.raises(RequestError) as error:
        ask(Handle(replica(False), good))
    assert error.value.code is ErrorCode.REPLICA_LOST


def test_pictures_that_were_being_loaded_when_a_replica_died_go_to_no_other() -> None:
    handle = Handle(dies_loading, good)
    with pytest.raises(RequestError) as error:
        ask(handle)
    assert error.value.code is ErrorCode.REPLICA_LOST
    assert error.value.status == 503
    assert len(handle.left) == 1


def test_replica_that_hangs_is_given_up() -> None:
    handle = Handle(hangs)
    started = time.monotonic()
    with pytest.raises(RequestError) as error:
        ask(handle, seconds=0.2)
    assert error.value.code is ErrorCode.OVERLOADED
    assert time.monotonic() - started < 5
    assert handle.streams[0].cancelled


def test_model_that_refuses_is_not_asked_for_a_moment() -> None:
    async def main() -> None:
        handle = Handle(full, good)
        service = api(handle)
        for waited in (7, 7):
            with pytest.raises(RequestError) as error:
                await service.caption("first", UPLOAD, DecodeConfig())
            assert error.value.retry_after_s == pytest.approx(waited, abs=0.5)
        assert len(handle.streams) == 1
        await asyncio.sleep(0.6)
        assert (await service.caption("first", UPLOAD, DecodeConfig())).version == "v"

    asyncio.run(main())
