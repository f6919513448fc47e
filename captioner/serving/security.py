"""What stands between the network and the API: tokens, bounds on what clients may hold, security headers."""

import asyncio
import base64
import binascii
import hashlib
import hmac
import json
import os
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from pydantic import BaseModel, ConfigDict

from captioner import storage
from captioner.config import ServeConfig
from captioner.errors import ConfigError

TOKENS = "CAPTIONER_TOKENS"
HEALTH_PATHS = ("/healthz", "/-/healthz")
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
# Set by clients they would switch off Ray Serve's own time limit and its watch for clients that leave.
_STRIPPED = (b"x-request-timeout-seconds", b"x-request-disconnect-disabled")
_ATTEMPTS = 4
_CODES = {404: "not_found", 405: "method_not_allowed", 408: "timeout", 503: "overloaded"}
_ADVICE = {
    404: "no such path; /openapi.json lists them",
    405: "this path does not take that method; see /openapi.json",
    408: "no answer in time; try again",
    503: "the service is busy or starting; try again after the seconds in Retry-After",
}

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class GuardSettings(BaseModel):
    """Bounds of a ``Guard``. It holds digests of tokens, never the tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    token_digests: tuple[str, ...] = ()
    max_request_bytes: int = 64 * 2**20
    max_uploads: int = 256
    max_upload_bytes: int = 512 * 2**20
    upload_timeout_s: float = 20.0
    retry_after_s: int = 1

    @classmethod
    def of(cls, config: ServeConfig) -> "GuardSettings":
        """
        Raises:
            ConfigError: the token file cannot be used.
        """
        shared = cls.model_fields.keys() & ServeConfig.model_fields.keys()
        values = {name: getattr(config, name) for name in shared}
        return cls(token_digests=digest_tokens(read_tokens(config.token_file)), **values)


def read_tokens(token_file: str | None) -> list[str]:
    """Accepted tokens from the file and from ``CAPTIONER_TOKENS``; white space separates them.

    Raises:
        ConfigError: the file cannot be read, or either holds no token.
    """
    found: list[str] = []
    for name, text in ((TOKENS, os.environ.get(TOKENS)), ("token_file", token_file)):
        if text is None:
            continue
        if name == "token_file":
            try:
                text = storage.read_bytes(text).decode()
            except UnicodeDecodeError:
                raise ConfigError(f"token_file: {text} is not text") from None
        if not text.split():
            # An empty variable is a mistake that would leave the service open.
            raise ConfigError(f"{name}: there is no token in it")
        found += text.split()
    return found


def digest_tokens(tokens: Iterable[str]) -> tuple[str, ...]:
    return tuple(hashlib.sha256(token.encode()).hexdigest() for token in tokens)


def authorized(header: str, digests: Iterable[str]) -> bool:
    """Whether an ``Authorization`` header carries a known token: as a bearer, or as the password browsers ask for."""
    scheme, _, value = header.partition(" ")
    value = value.strip()
    if scheme.lower() == "basic":
        try:
            value = base64.b64decode(value, validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return False
    elif scheme.lower() != "bearer":
        return False
    digest = hashlib.sha256(value.encode()).hexdigest()
    found = False
    for known in digests:  # all of them, so that the time says nothing about which
        found |= hmac.compare_digest(digest, known)
    return found


class Guard:
    """ASGI middleware: lets through requests that may come in, once they are complete.

    The application behind it never waits for a client: a body is read here, within a time and a size. A second
    Guard, in Ray Serve's HTTP proxy, repeats a request whose replica died before it answered.
    """

    def __init__(
        self,
        app: App,
        settings: GuardSettings,
        reject: Callable[[str], None],
        observe: Callable[[str, str, int, float], None] | None = None,
    ):
        """
        Args:
            reject: called with the error code of every request turned away here.
            observe: called with path, method, status and seconds of every request.
        """
        self.app, self.settings = app, settings
        self._reject, self._observe = reject, observe
        self._uploads = self._bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1003})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        reply = _Reply(send, self.settings.retry_after_s)
        headers = {name.lower(): value for name, value in scope["headers"]}
        try:
            await self._admit(scope, headers, receive, reply)
        finally:
            if self._observe is not None and reply.status:
                seconds = time.perf_counter() - started
                self._observe(scope["path"], scope["method"], reply.status, seconds)

    async def _admit(
        self, scope: Scope, headers: dict[bytes, bytes], receive: Receive, reply: "_Reply"
    ) -> None:
        refusal = self._refuse(scope, headers)
        if refusal is not None:
            complete = await self._discard(headers, receive)
            if complete is not None:
                status, code, message, extra = refusal
                self._reject(code)
                await reply.error(status, code, message, extra, close=not complete)
            return
        self._uploads += 1
        body = bytearray()
        try:
            problem = await self._read(headers, receive, body)
            if problem is None:
                await self._forward(scope, bytes(body), receive, reply)
            elif problem != "gone":
                self._reject(_PROBLEMS[problem][1])
                await reply.error(*_PROBLEMS[problem], {}, close=True)
        finally:
            self._uploads -= 1
            self._bytes -= len(body)

    def _refuse(
        self, scope: Scope, headers: dict[bytes, bytes]
    ) -> tuple[int, str, str, dict[str, str]] | None:
        """Why a request is turned away by its headers alone: status, code, message and further headers."""
        settings = self.settings
        if settings.token_digests and scope["path"] not in HEALTH_PATHS:
            given = headers.get(b"authorization", b"").decode("latin-1")
            if not authorized(given, settings.token_digests):
                challenge = "Bearer" if given or not _is_page(headers) else "Basic"
                advice = "send a valid token: Authorization: Bearer TOKEN"
                extra = {"www-authenticate": f'{challenge} realm="captioner"'}
                return 401, "unauthorized", advice, extra
        if self._uploads >= settings.max_uploads or self._bytes >= settings.max_upload_bytes:
            return 503, "overloaded", _ADVICE[503], {}
        return None

    async def _discard(self, headers: dict[bytes, bytes], receive: Receive) -> bool | None:
        """Throw the body away, because most clients send all before they read the answer.

        Returns:
            Whether it came to its end; None: the client left.
        """
        if b"expect" in headers:
            return False  # the client waits to be asked for the body, and is not
        seen = 0
        try:
            async with asyncio.timeout(self.settings.upload_timeout_s):
                while seen <= 4 * self.settings.max_request_bytes:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    if not message.get("more_body", False):
                        return True
                    seen += len(message.get("body", b""))
        except TimeoutError:
            pass
        return False

    async def _read(
        self, headers: dict[bytes, bytes], receive: Receive, body: bytearray
    ) -> str | None:
        """Read the request into ``body``; what is wrong with it, None if nothing."""
        limit = self.settings.max_request_bytes
        length = headers.get(b"content-length", b"")
        announced = int(length) if length.isdigit() else 0
        if announced > limit and b"expect" in headers:
            return "large"  # the client waits to be asked for the body, and is not
        seen, problem = 0, "large" if announced > limit else None
        try:
            async with asyncio.timeout(self.settings.upload_timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return "gone"
                    piece = message.get("body", b"")
                    seen += len(piece)
                    if problem is None:
                        body += piece
                        self._bytes += len(piece)
                        if seen > limit:
                            problem = "large"
                        elif self._bytes > self.settings.max_upload_bytes:
                            problem = "full"
                    if problem is not None:
                        self._bytes -= len(body)
                        body.clear()
                    # What follows is thrown away, because most clients send all before they read the answer; an
                    # endless request still ends here.
                    if not message.get("more_body", False) or seen > 4 * limit:
                        return problem
        except TimeoutError:
            return "slow"

    async def _forward(self, scope: Scope, body: bytes, receive: Receive, reply: "_Reply") -> None:
        scope = dict(scope)
        scope["headers"] = [
            (name, value) for name, value in scope["headers"] if name.lower() not in _STRIPPED
        ]
        gone = False

        def replay() -> Receive:
            sent = False

            async def again() -> MutableMapping[str, Any]:
                nonlocal sent, gone
                if not sent:
                    sent = True
                    return {"type": "http.request", "body": body, "more_body": False}
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
        self._reject("overloaded")
        await reply.error(503, "overloaded", _ADVICE[503], {})


_PROBLEMS = {
    "large": (413, "request_too_large", "the request is too large: send fewer or smaller images"),
    "slow": (408, "upload_timeout", "the request did not arrive in time: send less, or faster"),
    "full": (503, "overloaded", _ADVICE[503]),
}


class _Reply:
    """``send`` with our headers, and with JSON in place of other errors, such as those of Ray Serve's proxy."""

    def __init__(self, send: Send, retry_after_s: int):
        self._send, self._retry_after = send, retry_after_s
        self.status = 0
        self._replaced = False

    async def __call__(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            headers = dict(message["headers"])
            status = int(message["status"])
            if status >= 400 and not headers.get(b"content-type", b"").startswith(
                b"application/json"
            ):
                self._replaced = True
                code = _CODES.get(status, "error")
                await self.error(status, code, _ADVICE.get(status, "the request failed"), {})
                return
            self.status = status
            message = {**message, "headers": self._with_ours(headers, status)}
        elif self._replaced:
            return
        await self._send(message)

    async def error(
        self, status: int, code: str, message: str, extra: dict[str, str], *, close: bool = False
    ) -> None:
        """Answer with an error. With ``close`` the connection ends: what the client still sends is not read."""
        self.status = status
        body = json.dumps({"error": {"code": code, "message": message}}).encode()
        headers = {
            b"content-type": b"application/json",
            b"content-length": str(len(body)).encode(),
            **{name.encode(): value.encode() for name, value in extra.items()},
        }
        if close:
            headers[b"connection"] = b"close"
        start = {"type": "http.response.start", "status": status}
        await self._send({**start, "headers": self._with_ours(headers, status)})
        await self._send({"type": "http.response.body", "body": body})

    def _with_ours(self, headers: dict[bytes, bytes], status: int) -> list[tuple[bytes, bytes]]:
        ours = {name.encode(): value.encode() for name, value in HEADERS.items()}
        if status == 503:
            ours[b"retry-after"] = str(self._retry_after).encode()
        return list((ours | headers).items())


def _is_page(headers: dict[bytes, bytes]) -> bool:
    return b"text/html" in headers.get(b"accept", b"")
