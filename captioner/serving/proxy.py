"""What Ray Serve's HTTP proxies run before their own code: ``RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH`` names it.

The proxies answer some paths themselves (``/-/routes``), and their server waits for ever for a client that stops in the
middle of its headers or of reading an answer. Both are closed here.
"""

import asyncio
import os
from typing import Any

import uvicorn.config
from starlette.middleware import Middleware
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from captioner.serving.guard import Guard, GuardSettings
from captioner.serving.metrics import count_rejected
from captioner.serving.tokens import digest_tokens, read_tokens

CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
CALLBACK_PATH = "captioner.serving.proxy.middlewares"
SETTINGS = "CAPTIONER_GUARD"


def middlewares() -> list[Middleware]:
    """Called once in every proxy, before its server starts."""
    settings = proxy_settings()
    BoundedProtocol.seconds = settings.upload_timeout_s
    # Ray Serve hands uvicorn neither a protocol nor a time for the headers, for which uvicorn has no option; of
    # protocols that are asked for by name this table decides.
    uvicorn.config.HTTP_PROTOCOLS["auto"] = f"{__name__}:{BoundedProtocol.__name__}"
    return [Middleware(Guard, settings=settings, reject=count_rejected)]


def proxy_settings() -> GuardSettings:
    """From the environment of the proxy's node: ``CAPTIONER_GUARD`` (JSON) for all of them, else the tokens alone."""
    text = os.environ.get(SETTINGS)
    if text:
        return GuardSettings.model_validate_json(text)
    return GuardSettings(token_digests=digest_tokens(read_tokens(None)))


class BoundedProtocol(HttpToolsProtocol):
    """A connection that is cut when its client neither completes its headers nor takes its answer in time."""

    seconds: float
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._start()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._start()

    def on_headers_complete(self) -> None:
        self._stop()
        super().on_headers_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._start()

    def resume_writing(self) -> None:
        self._stop()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def _start(self) -> None:
        self._stop()
        # close() would wait until the client has taken what is buffered; abort() does not.
        self._timer = self.loop.call_later(self.seconds, self.transport.abort)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
