"""A connection to one of Ray Serve's HTTP proxies, bounded before a token is seen.

Their server, uvicorn, takes any number of connections, waits for ever for a client that stops in the middle of its
headers or of reading an answer, and keeps headers of any size, and requests that come ahead in any number.
"""

import asyncio
import ssl
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

import uvicorn.config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from captioner.serving.errors import ErrorCode, RequestError
from captioner.serving.guard import (
    HEALTH_PATHS,
    GuardSettings,
    log_request,
    new_request_id,
    raw_answer,
)
from captioner.serving.metrics import count_rejected, count_request

# Requests of a connection that wait behind its first.
_MOST_PIPELINED = 8
# Connections for health beyond the bounds, and how long each has for its headers.
_RESERVE, _RESERVE_PER_ADDRESS, _RESERVE_S = 64, 4, 2.0
_create_context = uvicorn.config.create_ssl_context


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

    @property
    def seconds(self) -> float:
        """For the client's next step, a handshake or headers."""
        return self.settings.upload_timeout_s if self._place is self.addresses else _RESERVE_S

    def enter(self, transport: Any) -> bool:
        """Take a place, if there is one."""
        self._address = (transport.get_extra_info("peername") or ("",))[0]
        if (
            self.addresses.total() < self.settings.max_connections
            and self.addresses[self._address] < self.settings.max_connections_per_address
        ):
            self._place = self.addresses
        elif self.reserve.total() < _RESERVE and self.reserve[self._address] < _RESERVE_PER_ADDRESS:
            self._place = self.reserve
        else:
            return False
        self._place[self._address] += 1
        return True

    def leave(self) -> None:
        """Give the place back, if there is one."""
        if self._place is not None:
            self._place[self._address] -= 1
            if not self._place[self._address]:
                del self._place[self._address]
            self._place = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if self._place is None and not self.enter(transport):
            self._refuse(ErrorCode.OVERLOADED)
        elif self._place is self.addresses:
            self._start("head", self.seconds, transport.abort)
        else:
            self._start("head", self.seconds, self._refuse, ErrorCode.OVERLOADED)

    def connection_lost(self, exc: Exception | None) -> None:
        for name in list(self._timers):
            self._stop(name)
        self.leave()
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
                self._start("head", self.seconds, self.transport.abort)

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


class TlsProtocol(asyncio.Protocol):
    """The same behind a certificate: a connection has its place, and its time, from before the handshake on.

    A server that is given the certificate shows connections to nobody until they have shaken hands.
    """

    context: ClassVar[ssl.SSLContext | None] = None

    def __init__(self, inner: BoundedProtocol):
        self._inner = inner
        self._early: list[bytes] = []

    def connection_made(self, transport: Any) -> None:
        if self.context is None or not self._inner.enter(transport):
            transport.abort()  # nothing can be told yet
            return
        self._transport = transport
        self._steps = asyncio.get_running_loop().start_tls(
            transport,
            self,
            self.context,
            server_side=True,
            ssl_handshake_timeout=self._inner.seconds,
        )
        # As a task it would begin too late: uvloop hands over what has come already, which would be lost.
        self._steps.send(None).add_done_callback(self._shaken)

    def _shaken(self, hands: "asyncio.Future[None]") -> None:
        try:
            self._steps.send(None)
        except StopIteration as made:
            made.value.set_protocol(self._inner)
            self._inner.connection_made(made.value)
            for data in self._early:
                self._inner.data_received(data)
        except OSError:  # ssl's own errors are such
            self._transport.abort()
            self._inner.leave()

    def data_received(self, data: bytes) -> None:
        """What comes with the end of the handshake, before the other protocol takes over."""
        self._early.append(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._inner.leave()


def make_connection(**options: Any) -> BoundedProtocol | TlsProtocol:
    """The protocol of a new connection, as uvicorn asks for it."""
    bounded = BoundedProtocol(**options)
    return bounded if TlsProtocol.context is None else TlsProtocol(bounded)


def keep_context(*args: Any, **options: Any) -> None:
    """In place of uvicorn's function for making the server's TLS context, which the server is to know nothing of."""
    TlsProtocol.context = _create_context(*args, **options)
