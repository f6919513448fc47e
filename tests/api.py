"""The HTTP API over a service that only pretends, and a client of it."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import httpx

from captioner.config import DecodeConfig, ServeConfig
from captioner.serving.app import create_app
from captioner.serving.errors import RequestError
from captioner.serving.guard import GuardSettings
from captioner.serving.messages import CaptionResponse, EncoderCard, ImageCaption, ModelCard, Timing
from captioner.serving.uploads import Upload

SEARCHES = {"first": DecodeConfig(), "second": DecodeConfig(beam_size=6, no_repeat_ngram=3)}


def card(name: str) -> ModelCard:
    return ModelCard(
        name=name, version="v", decoder="merge", vocabulary_size=10, attention=False,
        encoder=EncoderCard(family="resnet50", name="resnet50", layer="layer4"),
        decode=SEARCHES[name], default=name == "first",
    )  # fmt: skip


class Service:
    """Answers with what it was asked."""

    def __init__(self) -> None:
        self.cards = {name: card(name) for name in SEARCHES}
        self.asked: list[tuple[str, Upload, DecodeConfig]] = []
        self.states = {"first": "ok", "second": "ok"}
        self.error: RequestError | None = None

    async def caption(self, model: str, upload: Upload, decode: DecodeConfig) -> CaptionResponse:
        self.asked.append((model, upload, decode))
        if self.error is not None:
            raise self.error
        captions = [
            ImageCaption(
                name=name, caption=str(len(data)), log_prob=-1.0, probability=0.3,
                alternatives=[], attention=None, attention_box=(0, 0, 1, 1),
            )
            for data, name in zip(upload.images, upload.names, strict=True)
        ]  # fmt: skip
        timing = Timing(load_ms=1, wait_ms=1, model_ms=1, total_ms=1, batch_size=1)
        return CaptionResponse(model=model, version="v", captions=captions, timing=timing)

    async def health(self) -> dict[str, str]:
        return self.states

    async def metrics(self) -> str:
        return "ray_captioner_requests_total 1\n"


class Client:
    """An API with its settings, and what it reported."""

    def __init__(self, guard: dict[str, Any] | None = None, **settings: Any):
        self.service = Service()
        self.rejected: Counter[str] = Counter()
        self.observed: list[tuple[str, str, int]] = []
        self.app = create_app(
            self.service,
            ServeConfig(model=("first=x", "second=y"), **settings),
            GuardSettings(**guard or {}),
            reject=lambda code: self.rejected.update([code]),
            observe=lambda path, method, status, _: self.observed.append((path, method, status)),
        )

    def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        async def send(http: httpx.AsyncClient) -> httpx.Response:
            return await http.request(method, path, **options)

        return with_http(self.app, send)

    def post(self, path: str = "/v1/captions", **options: Any) -> httpx.Response:
        return self.ask("POST", path, **options)


def with_http(app: Any, run: Callable[[httpx.AsyncClient], Awaitable[Any]]) -> Any:
    """What ``run`` makes of a client whose requests go straight to an ASGI application."""

    async def main() -> Any:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            return await run(http)

    return asyncio.run(main())
