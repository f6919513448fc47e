"""The HTTP deployment: the API, and the way from it to the models' replicas."""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from ray.exceptions import RayActorError, RayError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponse

from captioner.config import DecodeConfig, ServeConfig
from captioner.serving import metrics
from captioner.serving.app import CaptionService, create_app
from captioner.serving.errors import ErrorCode, RequestError
from captioner.serving.guard import GuardSettings
from captioner.serving.messages import CaptionResponse, ModelCard
from captioner.serving.uploads import Upload

logger = logging.getLogger(__name__)

_ATTEMPTS = 4
_PROBE_TIMEOUT_S = 5.0
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
        started = time.perf_counter()
        handle = self._handles[model].caption
        arguments = (upload.images, upload.names, decode, upload.parameters.attention)
        found: CaptionResponse | RequestError = await self._ask(
            lambda: handle.remote(*arguments), self._config.request_timeout_s
        )
        if isinstance(found, RequestError):
            raise found
        self._worked[model] = time.monotonic()
        total_ms = round(1e3 * (time.perf_counter() - started), 2)
        timing = found.timing.model_copy(update={"total_ms": total_ms})
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
            await self._ask(self._handles[name].probe.remote, _PROBE_TIMEOUT_S)
        except (RequestError, RayError) as error:
            return " ".join(str(error).split())[:200]
        self._worked[name] = time.monotonic()
        return "ok"

    async def _ask(self, call: Callable[[], DeploymentResponse[Any]], timeout_s: float) -> Any:
        """A replica's answer; a replica that dies is replaced by another, for captions depend on nothing it kept."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        for attempt in range(_ATTEMPTS):
            response = call()
            try:
                async with asyncio.timeout_at(deadline):
                    return await response
            except (BackPressureError, DeploymentUnavailableError):
                break
            except TimeoutError:
                response.cancel()
                break
            except asyncio.CancelledError:
                response.cancel()
                raise
            except (RayActorError, TaskCancelledError) as error:
                logger.warning("attempt %d: %s", attempt + 1, " ".join(str(error).split())[:200])
        raise RequestError(ErrorCode.OVERLOADED)
