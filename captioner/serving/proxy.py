"""What Ray Serve's HTTP proxies run before their own code: ``RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH`` names it.

The proxies answer some paths themselves (``/-/routes``), and their server takes any number of connections, waits for
ever for a client that stops in the middle of its headers or of reading an answer, and keeps headers of any size. All of
that is bounded here, before a token is seen.
"""

import asyncio
import os
from collections import Counter
from typing import Any, ClassVar

import uvicorn.config
from starlette.middleware import Middleware
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from captioner.serving.errors import ErrorCode, RequestError
from captioner.serving.guard import Guard, GuardSettings, raw_answer
from captioner.serving.metrics import count_rejected, count_request
from captioner.serving.tokens import digest_tokens, read_tokens

CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
CALLBACK_PATH = "captioner.serving.proxy.middlewares"
SETTINGS = "CAPTIONER_GUARD"


def middlewares() -> list[Middleware]:
    """Called once in every proxy, before its server starts."""
    settings = proxy_settings()
    BoundedProtocol.settings = settings
    # Ray Serve hands uvicorn neither a protocol nor a time for the headers, for which uvicorn has no option; of
    # protocols that are asked for by name this table decides.
    uvicorn.config.HTTP_PROTOCOLS["auto"] = f"{__name__}:{BoundedProtocol.__name__}"
    return [Middleware(Guard, settings=settings, reject=count_rejected, observe=count_request)]


def proxy_settings() -> GuardSettings:
    """From the environment of the proxy's node: ``CAPTIONER_GUARD`` (JSON) for all of them, else the tokens alone."""
    text = os.environ.get(SETTINGS)
    if text:
        return GuardSettings.model_validate_json(text)
    return GuardSettings(token_digests=digest_tokens(read_tokens(None)))


class BoundedProtocol(HttpToolsProtocol):
    """A connection that is cut when its client neither completes its headers nor takes its answer in time, or sends too
    much of what is neither a body nor a complete request, and refused where there are too many."""

    settings: GuardSettings
    addresses: ClassVar[Counter[str]] = Counter()
    """Connections by address."""
    _timer: asyncio.TimerHandle | None = None
    _admitted = _refused = False
    _pending = _head = 0
    """Bytes of which nothing has come yet, and of the headers that have."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        # Nothing here talks over web sockets, whose protocol would take the connection out of these bounds.
        self.ws_protocol_class = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._address = self.client[0] if self.client else ""
        if (
            self.addresses.total() >= self.settings.max_connections
            or self.addresses[self._address] >= self.settings.max_connections_per_address
        ):
            self._refuse(ErrorCode.OVERLOADED)
            return
        self._admitted = True
        self.addresses[self._address] += 1
        self._start()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        if self._admitted:
            self._admitted = False
            self.addresses[self._address] -= 1
            if not self.addresses[self._address]:
                del self.addresses[self._address]
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        self._pending += len(data)
        super().data_received(data)
        if self._pending > self.settings.max_header_bytes and not self._refused:
            self._refuse(ErrorCode.HEADERS_TOO_LARGE)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head = 0
        self._start()

    def on_url(self, url: bytes) -> None:
        self._head += len(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head += len(name) + len(value) + 4
        if self._head <= self.settings.max_header_bytes:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._stop()
        self._pending = 0
        if self._head > self.settings.max_header_bytes:
            self._refuse(ErrorCode.HEADERS_TOO_LARGE)
        if not self._refused:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._pending = 0
        if not self._refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._pending = 0
        if not self._refused:
            super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        if not self._refused:
            self._refuse(ErrorCode.BAD_REQUEST)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._start()

    def resume_writing(self) -> None:
        self._stop()
        super().resume_writing()

    def _refuse(self, code: ErrorCode) -> None:
        """Answer, and hear no more of this client."""
        self._refused = True
        count_rejected(code.code)
        count_request("other", "other", code.status, 0.0)
        self._start()  # for a client that does not take even this
        if self.cycle is None or self.cycle.response_complete:
            error = RequestError(code, retry_after_s=self.settings.retry_after_s)
            self.transport.write(raw_answer(error))
        self.transport.close()

    def _start(self) -> None:
        self._stop()
        # close() would wait until the client has taken what is buffered; abort() does not.
        self._timer = self.loop.call_later(self.settings.upload_timeout_s, self.transport.abort)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
