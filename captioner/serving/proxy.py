"""What Ray Serve's HTTP proxies run before their own code: ``RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH`` names it.

The proxies answer some paths themselves (``/-/routes``), and their server takes any number of connections, waits for
ever for a client that stops in the middle of its headers or of reading an answer, and keeps headers of any size. All of
that is bounded here, before a token is seen.
"""

import asyncio
import os
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

import uvicorn.config
from starlette.middleware import Middleware
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from captioner.serving.errors import ErrorCode, RequestError
from captioner.serving.guard import (
    HEALTH_PATHS,
    Guard,
    GuardSettings,
    log_request,
    new_request_id,
    raw_answer,
)
from captioner.serving.metrics import count_rejected, count_request
from captioner.serving.tokens import digest_tokens, read_tokens

CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
CALLBACK_PATH = "captioner.serving.proxy.middlewares"
SETTINGS = "CAPTIONER_GUARD"

# Requests of a connection that wait behind its first.
_MOST_PIPELINED = 8
# Connections for health beyond the bounds, and how long each has for its headers.
_RESERVE, _RESERVE_PER_ADDRESS, _RESERVE_S = 64, 4, 2.0


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
    much of what is neither a body nor a complete request, and refused where there are too many.

    Beyond the bounds a few connections more are heard for a moment: whoever asks for health is answered.
    """

    settings: GuardSettings
    addresses: ClassVar[Counter[str]] = Counter()
    """Connections by address."""
    reserve: ClassVar[Counter[str]] = Counter()
    """Those beyond the bounds."""
    _place: Counter[str] | None = None
    _refused = False
    _pending = _head = 0
    """Bytes of which nothing has come yet, and of the headers that have."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self._timers: dict[str, asyncio.TimerHandle] = {}
        # Nothing here talks over web sockets, whose protocol would take the connection out of these bounds.
        self.ws_protocol_class = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._address = self.client[0] if self.client else ""
        if (
            self.addresses.total() < self.settings.max_connections
            and self.addresses[self._address] < self.settings.max_connections_per_address
        ):
            self._place = self.addresses
            self._start("head", self.settings.upload_timeout_s, transport.abort)
        elif self.reserve.total() < _RESERVE and self.reserve[self._address] < _RESERVE_PER_ADDRESS:
            self._place = self.reserve
            self._start("head", _RESERVE_S, self._refuse, ErrorCode.OVERLOADED)
        else:
            self._refuse(ErrorCode.OVERLOADED)
            return
        self._place[self._address] += 1

    def connection_lost(self, exc: Exception | None) -> None:
        for name in list(self._timers):
            self._stop(name)
        if self._place is not None:
            self._place[self._address] -= 1
            if not self._place[self._address]:
                del self._place[self._address]
            self._place = None
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        self._pending += len(data)
        super().data_received(data)
        if self._pending > self.settings.max_header_bytes and not self._refused:
            self._refuse(ErrorCode.HEADERS_TOO_LARGE)

    def on_message_begin(self) -> None:
        if not self._refused and len(self.pipeline) >= _MOST_PIPELINED:
            # uvicorn would keep all that come, and hear on after every answer.
            self._end()
        if not self._refused:
            super().on_message_begin()
            self._head = 0
            if self._place is self.addresses:
                self._start("head", self.settings.upload_timeout_s, self.transport.abort)

    def on_url(self, url: bytes) -> None:
        if not self._refused:
            self._head += len(url)
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head += len(name) + len(value) + 4
        if not self._refused and self._head <= self.settings.max_header_bytes:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._refused:
            return
        self._stop("head")
        self._pending = 0
        beyond = self._place is not self.addresses
        if self._head > self.settings.max_header_bytes:
            self._refuse(ErrorCode.HEADERS_TOO_LARGE)
        elif beyond and self.url.partition(b"?")[0].decode("latin-1") not in HEALTH_PATHS:
            self._refuse(ErrorCode.OVERLOADED)
        else:
            super().on_headers_complete()
            if beyond:
                self.cycle.keep_alive = False

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
        # close() would wait until the client has taken what is buffered; abort() does not.
        self._start("write", self.settings.upload_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        self._stop("write")
        super().resume_writing()

    def _refuse(self, code: ErrorCode) -> None:
        """Answer, and hear no more of this client; where it still waits for other answers, they come instead."""
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            if self.pipeline or cycle.response_started or not cycle.more_body:
                self._end()
                return
            # The request that is wrong, of which the application has heard.
            cycle.disconnected = True
            cycle.message_event.set()
        self._refused = True
        self._stop("head")
        # For a client that does not take even this.
        self._start("write", self.settings.upload_timeout_s, self.transport.abort)
        count_rejected(code.code)
        count_request("other", "other", code.status, 0.0)
        request_id = new_request_id()
        if self.settings.access_log:
            log_request(request_id, "other", "other", code.status, 0.0)
        limit = self.settings.max_header_bytes
        advice = f"send at most {limit} bytes" if code is ErrorCode.HEADERS_TOO_LARGE else ""
        retry_after_s = self.settings.retry_after_s if code.status == 503 else 0
        error = RequestError(code, advice=advice, retry_after_s=retry_after_s)
        self.transport.write(raw_answer(error, request_id))
        self.transport.close()

    def _end(self) -> None:
        """Hear no more, and close behind the last answer that is under way."""
        self._refused = True
        self._stop("head")
        self.cycle.keep_alive = False

    def _start(self, name: str, seconds: float, then: Callable[..., object], *args: Any) -> None:
        self._stop(name)
        self._timers[name] = self.loop.call_later(seconds, then, *args)

    def _stop(self, name: str) -> None:
        if (timer := self._timers.pop(name, None)) is not None:
            timer.cancel()
