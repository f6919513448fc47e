"""The HTTP deployment: the API, and the way from it to the models' replicas."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from fastapi import FastAPI
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    TaskCancelledError,
    WorkerCrashedError,
)
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponse, DeploymentResponseGenerator

from captioner.config import DecodeConfig, ServeConfig
from captioner.serving import metrics
from captioner.serving.app import CaptionService, create_app
from captioner.serving.errors import ErrorCode, RequestError
from captioner.serving.guard import GuardSettings
from captioner.serving.messages import CaptionResponse, ModelCard
from captioner.serving.uploads import Upload

logger = logging.getLogger(__name__)

Response = TypeVar("Response", bound=DeploymentResponse[Any] | DeploymentResponseGenerator[Any])

# A replica died, or what it said was lost with its node.
_LOST = (RayActorError, WorkerCrashedError, NodeDiedError, OutOfMemoryError, ObjectLostError)
# A request whose replica died is asked once more.
_ATTEMPTS = 2
_PROBE_TIMEOUT_S = 5.0
# Replicas answer in time or refuse; only from those that hang nothing comes.
_GRACE_S = 1.0
# After a refusal nothing is sent to a model for so long, at most: a share of what its queue holds, so that it never
# runs dry, and refusing what floods in costs no core that the model could use.
_CLOSED_S = 0.5
_CLOSED_SHARE = 0.02
# A caption this recent is as good as a probe: a busy service is a ready one.
_FRESH_S = 3.0


class CaptionApi(CaptionService):
    """A replica of the API."""

    def __init__(
        self,
        config: ServeConfig,
        guard: GuardSettings,
        cards: dict[str, ModelCard],
        handles: dict[str, DeploymentHandle],
    ):
        self._config, self._guard, self.cards, self._handles = config, guard, cards, handles
        self._worked = dict.fromkeys(cards, -_FRESH_S)
        self._closed = dict.fromkeys(cards, (0.0, 0.0))  # until when, and when there will be room
        self._probing: asyncio.Task[dict[str, str]] | None = None

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(
            self,
            self._config,
            self._guard,
            reject=metrics.count_rejected,
            observe=metrics.count_request,
        )

    async def caption(self, model: str, upload: Upload, decode: DecodeConfig) -> CaptionResponse:
        started = time.monotonic()
        closed, room = self._closed[model]
        if started < closed:
            raise RequestError(ErrorCode.OVERLOADED, retry_after_s=room - started)
        handle = self._handles[model].options(stream=True).caption
        deadline = started + self._config.request_timeout_s
        arguments = (upload.images, upload.names, decode, upload.parameters.attention)
        found: CaptionResponse | RequestError = await self._ask(
            lambda: handle.remote(*arguments, deadline - time.monotonic()),
            _last,
            deadline + _GRACE_S,
        )
        now = time.monotonic()
        if isinstance(found, RequestError):
            if found.retry_after_s:
                closed_s = min(_CLOSED_S, _CLOSED_SHARE * self._config.request_timeout_s)
                self._closed[model] = (now + closed_s, now + found.retry_after_s)
            raise found
        self._worked[model] = now
        timing = found.timing.model_copy(update={"total_ms": round(1e3 * (now - started), 2)})
        return found.model_copy(update={"timing": timing})

    async def health(self) -> dict[str, str]:
        # Any number of askers share one probe.
        if self._probing is None or self._probing.done():
            self._probing = asyncio.create_task(self._probe_all())
        return await asyncio.shield(self._probing)

    async def metrics(self) -> str:
        try:
            return await asyncio.to_thread(metrics.exposition)
        except OSError as error:
            problem = f"the metrics of Ray's nodes cannot be read ({error})"
            raise RequestError(ErrorCode.NO_METRICS, problem) from error

    async def _probe_all(self) -> dict[str, str]:
        states = await asyncio.gather(*(self._probe(name) for name in self.cards))
        return dict(zip(self.cards, states, strict=True))

    async def _probe(self, name: str) -> str:
        if time.monotonic() - self._worked[name] < _FRESH_S:
            return "ok"
        try:
            deadline = time.monotonic() + _PROBE_TIMEOUT_S
            found = str(await self._ask(self._handles[name].health.remote, _only, deadline))
        except (RequestError, RayError) as error:
            return " ".join(str(error).split())[:200]
        return found

    async def _ask(
        self,
        call: Callable[[], Response],
        read: Callable[[Response], Awaitable[Any]],
        deadline: float,
    ) -> Any:
        """What ``read`` finds in a replica's response. A replica that dies is replaced by another, once, for captions
        depend on nothing it kept.

        Raises:
            RequestError: there is none in time.
        """
        for _ in range(_ATTEMPTS):
            response = call()
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    return await read(response)
            except (BackPressureError, DeploymentUnavailableError):
                break
            except TimeoutError:
                response.cancel()
                break
            except asyncio.CancelledError:
                response.cancel()
                raise
            except (*_LOST, TaskCancelledError) as error:
                logger.warning("a replica was lost: %s", " ".join(str(error).split())[:200])
        raise RequestError(ErrorCode.OVERLOADED)


async def _only(response: DeploymentResponse[Any]) -> Any:
    return await response


async def _last(response: DeploymentResponseGenerator[Any]) -> Any:
    """The answer behind the news that the images are loaded.

    Raises:
        RequestError: the replica died while it loaded them, perhaps of them: no other should.
    """
    loaded = False
    try:
        async for found in response:
            if found is not None:
                return found
            loaded = True
    except _LOST:
        if loaded:
            raise
        raise RequestError(ErrorCode.REPLICA_LOST) from None
    raise RuntimeError("a replica gave no answer")
