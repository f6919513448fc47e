"""What stands between the network and the API: tokens, bounds on what clients may hold, security headers.

Every request is counted once, and logged where that is asked for, by the outermost Guard that it passes.
"""

import asyncio
import json
import logging
import sys
import time
import uuid
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from captioner.config import ServeConfig, UploadBounds
from captioner.serving.errors import ErrorCode, RequestError
from captioner.serving.tokens import authorized, digest_tokens, read_tokens

logger = logging.getLogger(__name__)
access_logger = logging.getLogger("captioner.access")

HEALTH_PATHS = ("/healthz", "/-/healthz")
PATHS = frozenset(
    ("/", "/app.css", "/app.js", "/v1/captions", "/v1/models", "/metrics", "/openapi.json", "/-/routes", *HEALTH_PATHS)
)  # fmt: skip
"""Those that the service has. Clients make no labels of metrics and no words of logs."""
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
# What Ray Serve's proxy would let clients decide: its own time limit, its watch for clients that leave, the replica for
# a request. It takes - and _ for the same.
_STRIPPED = frozenset(
    (b"x-request-timeout-seconds", b"x-request-disconnect-disabled", b"serve-multiplexed-model-id", b"x-session-id")
)  # fmt: skip
# A request whose replica of the API died is sent once more.
_ATTEMPTS = 2
# In the scope that a proxy hands to the API, where no client can put it.
_COUNTED = "captioner.counted"
_DRAIN, _DRAINED = "drain", "drained"


# Ray Serve takes it over from the request, or makes one that answers from here would not have.
_REQUEST_ID = b"x-request-id"


class GuardSettings(UploadBounds):
    """Bounds of a ``Guard``. It holds digests of tokens, never the tokens."""

    token_digests: tuple[str, ...] = ()
    drain_folder: str | None = None
    """Where ``drain`` asks for the service's end, for Guards of the same machine."""

    @classmethod
    def of(cls, config: ServeConfig) -> "GuardSettings":
        """
        Raises:
            ConfigError, StoreError: the tokens cannot be used.
        """
        bounds = config.model_dump(include=set(UploadBounds.model_fields))
        return cls(token_digests=digest_tokens(read_tokens(config.token_file)), **bounds)


def drain(folder: Path, stop: Callable[[float], bool], timeout_s: float) -> None:
    """Have the Guard that watches ``folder`` refuse what comes, and wait until what is under way is answered.

    Args:
        stop: sleeps so many seconds, and says whether to wait no longer.
    """
    (folder / _DRAIN).touch()
    end = time.monotonic() + timeout_s
    while time.monotonic() < end and not (folder / _DRAINED).exists():
        if stop(0.1):
            return


def new_request_id() -> str:
    return uuid.uuid4().hex


def log_request(request_id: str, method: str, path: str, status: int, seconds: float) -> None:
    """A line of the access log."""
    access_logger.info("%s %s %s %d %.0f ms", request_id, method, path, status, 1e3 * seconds)


class _ClientGone(Exception):
    pass


class Guard:
    """ASGI middleware: lets through requests that may come in, once they are complete.

    The application behind it never waits for a client: a body is read here, within a time and a size. One stands in
    Ray Serve's HTTP proxies, on nodes whose environment asks for it, and repeats a request whose replica of the API
    died before it answered. One stands in the API, which cannot know whether a proxy guards it.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: GuardSettings,
        reject: Callable[[str], None],
        observe: Callable[[str, str, int, float], None],
    ):
        """
        Args:
            reject: called with the code of every error that is answered here.
            observe: called with path, method, status and seconds of every request that no Guard before has counted.
        """
        self.app, self.settings = app, settings
        self._reject, self._observe = reject, observe
        self._uploads = self._bytes = 0
        self._draining = False
        if settings.access_log and not access_logger.handlers:
            access_logger.addHandler(logging.StreamHandler(sys.stderr))
            access_logger.setLevel(logging.INFO)
            access_logger.propagate = False
        if settings.drain_folder is not None:
            self._watch = asyncio.create_task(self._await_drain(Path(settings.drain_folder)))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1003})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        headers = {name.lower(): value for name, value in scope["headers"]}
        # One word of ASCII: a log's line is made of words, and Ray Serve's proxy fails at what is no UTF-8.
        given = headers.get(_REQUEST_ID, b"").decode("ascii", "backslashreplace").split()
        request_id = "_".join(given)[:64] or new_request_id()
        others = [one for one in scope["headers"] if one[0].lower() != _REQUEST_ID]
        scope = {**scope, "headers": [*others, (_REQUEST_ID, request_id.encode())]}
        reply = _Reply(send, self.settings.retry_after_s, self._reject, request_id)
        outermost = _COUNTED not in scope
        inner = {**scope, _COUNTED: True}
        if scope["method"] == "HEAD":  # servers leave out the body
            inner["method"] = "GET"
        try:
            await self._admit(inner, headers, receive, reply)
        except Exception:
            # Nobody behind answered, so this does, and the log has what happened.
            logger.exception("request %s failed", reply.request_id)
            if not reply.status:
                await reply.error(RequestError(ErrorCode.ERROR))
        finally:
            if outermost and reply.status:
                self._count(scope, reply, time.perf_counter() - started)

    def _count(self, scope: Scope, reply: "_Reply", seconds: float) -> None:
        path = scope["path"] if scope["path"] in PATHS else "other"
        method = scope["method"] if scope["method"] in ("GET", "HEAD", "POST") else "other"
        self._observe(path, method, reply.status, seconds)
        if self.settings.access_log:
            log_request(reply.request_id, method, path, reply.status, seconds)

    async def _admit(
        self, scope: Scope, headers: dict[bytes, bytes], receive: Receive, reply: "_Reply"
    ) -> None:
        problem = self._refusal(scope["path"], headers)
        # Health takes no place of a request's, and is asked for when there is none left, too.
        admitted = problem is None and scope["path"] not in HEALTH_PATHS
        self._uploads += admitted
        pieces: list[bytes] = []
        try:
            problem, complete = await self._read(headers, receive, pieces, problem)
            if problem is None:
                # A single one, as a proxy hands it on, is not copied.
                pieces[:] = [b"".join(pieces)]
                await self._forward(scope, pieces, receive, reply)
                return
            extra = {} if problem is not ErrorCode.UNAUTHORIZED else _challenge(headers)
            limit = self.settings.max_request_bytes
            told = f"the request is over the limit of {limit} bytes (max_request_bytes)"
            error = RequestError(problem, told if problem is ErrorCode.REQUEST_TOO_LARGE else "")
            await reply.error(error, extra, close=self._draining or not complete)
        except _ClientGone:
            pass
        finally:
            self._uploads -= admitted
            self._release(pieces)

    def _refusal(self, path: str, headers: dict[bytes, bytes]) -> ErrorCode | None:
        """Why a request is turned away by its headers alone."""
        settings = self.settings
        if self._draining:
            return ErrorCode.OVERLOADED
        if path in HEALTH_PATHS:
            return None
        if settings.token_digests:
            given = headers.get(b"authorization", b"")
            if not authorized(given, settings.token_digests):
                return ErrorCode.UNAUTHORIZED
        if self._uploads >= settings.max_uploads or self._bytes >= settings.max_upload_bytes:
            return ErrorCode.OVERLOADED
        # A number that a server has understood, of any number of zeros.
        length = headers.get(b"content-length", b"").lstrip(b"0")
        if length.isdigit() and int(length[:20]) > settings.max_request_bytes:
            return ErrorCode.REQUEST_TOO_LARGE
        return None

    async def _await_drain(self, folder: Path) -> None:
        while not (folder / _DRAIN).exists():
            await asyncio.sleep(0.2)
        self._draining = True
        while self._uploads:
            await asyncio.sleep(0.05)
        (folder / _DRAINED).touch()

    async def _read(
        self,
        headers: dict[bytes, bytes],
        receive: Receive,
        pieces: list[bytes],
        problem: ErrorCode | None,
    ) -> tuple[ErrorCode | None, bool]:
        """Read the body into ``pieces``; where there is a problem, throw it away: most clients send all of it before
        they read the answer.

        Returns:
            The problem, and whether the request came to its end.

        Raises:
            _ClientGone: nobody waits for an answer.
        """
        if problem is not None and b"expect" in headers:
            return problem, False  # the client waits to be asked for the body, and is not
        limit = self.settings.max_request_bytes
        seen = 0
        try:
            async with asyncio.timeout(self.settings.upload_timeout_s):
                while seen <= 4 * limit:  # an endless request ends here
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _ClientGone
                    piece = message.get("body", b"")
                    seen += len(piece)
                    if problem is None:
                        pieces.append(piece)
                        self._bytes += len(piece)
                        if seen > limit:
                            problem = ErrorCode.REQUEST_TOO_LARGE
                        elif self._bytes > self.settings.max_upload_bytes:
                            problem = ErrorCode.OVERLOADED
                        if problem is not None:
                            self._release(pieces)
                    if not message.get("more_body", False):
                        return problem, True
        except TimeoutError:
            problem = problem or ErrorCode.UPLOAD_TIMEOUT
        return problem, False

    def _release(self, pieces: list[bytes]) -> None:
        self._bytes -= sum(map(len, pieces))
        pieces.clear()

    async def _forward(
        self, scope: Scope, pieces: list[bytes], receive: Receive, reply: "_Reply"
    ) -> None:
        scope = dict(scope)
        scope["headers"] = [
            (name, value)
            for name, value in scope["headers"]
            if name.lower().replace(b"_", b"-") not in _STRIPPED
        ]
        gone = False

        def replay() -> Receive:
            sent = False

            async def again() -> Message:
                nonlocal sent, gone
                if not sent:
                    sent = True
                    return {"type": "http.request", "body": pieces[0], "more_body": False}
                message = await receive()
                gone |= message["type"] == "http.disconnect"
                return message

            return again

        for attempt in range(_ATTEMPTS):
            # Each gets a scope of its own, which routers write to.
            await self.app(dict(scope), replay(), reply)
            if reply.status or gone:
                return
            # Ray Serve's proxy returns without an answer when a replica died with the request.
            await asyncio.sleep(0.1 * 2**attempt)
        await reply.error(RequestError(ErrorCode.OVERLOADED))


class _Reply:
    """``send`` with our headers, and with JSON in place of other errors, such as those of Ray Serve's proxy."""

    def __init__(
        self,
        send: Send,
        retry_after_s: int,
        reject: Callable[[str], None],
        request_id: str,
    ):
        self._send, self._retry_after, self._reject = send, retry_after_s, reject
        self.request_id = request_id
        self.status = 0
        self._replaced = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = dict(message["headers"])
            status = int(message["status"])
            if status >= 400 and not headers.get(b"content-type", b"").startswith(
                b"application/json"
            ):
                self._replaced = True
                await self.error(RequestError.of_status(status))
                return
            self.status = status
            message = {**message, "headers": self._with_ours(headers, status)}
        elif self._replaced:
            return
        await self._send(message)

    async def error(
        self, error: RequestError, extra: dict[bytes, bytes] | None = None, *, close: bool = False
    ) -> None:
        """Answer with an error. With ``close`` the connection ends: what the client still sends is not read."""
        self.status = error.status
        self._reject(error.code.code)
        body = json.dumps(error.body()).encode()
        headers = {
            b"content-type": b"application/json",
            b"content-length": str(len(body)).encode(),
            **(extra or {}),
        }
        if close:
            headers[b"connection"] = b"close"
        start = {"type": "http.response.start", "status": error.status}
        await self._send({**start, "headers": self._with_ours(headers, error.status)})
        await self._send({"type": "http.response.body", "body": body})

    def _with_ours(self, headers: dict[bytes, bytes], status: int) -> list[tuple[bytes, bytes]]:
        ours = {name.encode(): value.encode() for name, value in HEADERS.items()}
        ours[_REQUEST_ID] = self.request_id.encode()
        if status == 503:
            ours[b"retry-after"] = str(self._retry_after).encode()
        return list((ours | headers).items())


def raw_answer(error: RequestError, request_id: str) -> bytes:
    """An error as it goes over a connection that is closed behind it, before there was a request."""
    body = json.dumps(error.body()).encode()
    headers = {
        _REQUEST_ID.decode(): request_id,
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",
    }
    lines = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}"]
    lines += [f"{name}: {value}" for name, value in (HEADERS | headers | error.headers()).items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def _challenge(headers: dict[bytes, bytes]) -> dict[bytes, bytes]:
    """A browser that opens the page is asked for the token as for a password."""
    page = b"text/html" in headers.get(b"accept", b"") and not headers.get(b"authorization")
    return {b"www-authenticate": b'%s realm="captioner"' % (b"Basic" if page else b"Bearer")}
