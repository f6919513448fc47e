"""What stands between the network and the API: tokens, bounds, clients that misbehave, replicas that die."""

import asyncio
import base64
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from captioner.config import ServeConfig
from captioner.errors import ConfigError
from captioner.serving.guard import HEADERS, Guard, GuardSettings
from captioner.serving.tokens import TOKENS, digest_tokens, read_tokens
from tests.api import Client, with_http
from tests.pictures import picture

PICTURE = picture(0)


def test_every_answer_has_the_security_headers() -> None:
    client = Client(guard={"token_digests": digest_tokens(["right"])})
    for path in ("/healthz", "/", "/nothing"):
        for headers in ({}, {"authorization": "Bearer right"}):
            answer = client.ask("GET", path, headers=headers)
            assert HEADERS.items() <= dict(answer.headers).items()


PATHS = ("/", "/app.js", "/app.css", "/v1/models", "/openapi.json", "/metrics", "/nothing")


@pytest.mark.parametrize(
    "header",
    ["", "Bearer", "Bearer wrong", "bearer right2", "right", "Basic right", "Basic !!!!",
     "Basic " + base64.b64encode(b"user:wrong").decode()],
)  # fmt: skip
def test_without_a_token_only_health_is_open(header: str) -> None:
    client = Client(guard={"token_digests": digest_tokens(["right", "also"])})
    headers = {"authorization": header} if header else {}
    for path in PATHS:
        answer = client.ask("GET", path, headers=headers)
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "unauthorized"
        assert "Bearer" in answer.headers["www-authenticate"]
    assert client.post(content=PICTURE, headers=headers).status_code == 401
    assert client.ask("GET", "/healthz", headers=headers).status_code == 200
    assert not client.service.asked


@pytest.mark.parametrize(
    "header",
    ["Bearer right", "bearer also", "Basic " + base64.b64encode(b"me:right").decode()],
)
def test_any_of_the_tokens_opens_everything(header: str) -> None:
    client = Client(guard={"token_digests": digest_tokens(["right", "also"])})
    headers = {"authorization": header}
    assert client.post(content=PICTURE, headers=headers).status_code == 200
    assert client.ask("GET", "/v1/models", headers=headers).status_code == 200


def test_browser_that_opens_the_page_is_asked_for_the_token() -> None:
    client = Client(guard={"token_digests": digest_tokens(["right"])})
    answer = client.ask("GET", "/", headers={"accept": "text/html"})
    assert answer.headers["www-authenticate"].startswith("Basic")


def test_tokens_come_from_variable_and_file(monkeypatch: Any, tmp_path: Any) -> None:
    monkeypatch.delenv(TOKENS, raising=False)
    assert read_tokens(None) == []
    file = tmp_path / "tokens"
    file.write_text("one\ntwo\n")
    monkeypatch.setenv(TOKENS, "three")
    assert sorted(read_tokens(str(file))) == ["one", "three", "two"]
    config = ServeConfig(model=("x",), token_file=str(file))
    assert "one" not in GuardSettings.of(config).model_dump_json()
    file.write_text(" \n")
    with pytest.raises(ConfigError, match="token_file: there is no token"):
        read_tokens(str(file))
    monkeypatch.setenv(TOKENS, "")
    with pytest.raises(ConfigError, match=TOKENS):
        read_tokens(None)


def test_request_over_the_limit_is_413_and_not_kept() -> None:
    client = Client(guard={"max_request_bytes": 10_000})

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield bytes(4096)

    announced = client.post(content=bytes(10_001))
    assert announced.status_code == 413
    chunked = client.post(content=endless())
    assert chunked.status_code == 413
    assert chunked.headers["connection"] == "close"
    assert client.rejected == {"request_too_large": 2}


def test_client_that_waits_to_be_asked_is_refused_at_once() -> None:
    client = Client(guard={"max_request_bytes": 100})
    asked = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal asked
        asked += 1
        yield bytes(500)

    headers = {"expect": "100-continue", "content-length": "500"}
    assert client.post(content=body(), headers=headers).status_code == 413
    assert asked == 0


class Trickle:
    """A body that never ends."""

    def __init__(self, first: bytes = b"x") -> None:
        self.first, self.began, self.stopped = first, asyncio.Event(), asyncio.Event()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield self.first
        self.began.set()
        while not self.stopped.is_set():
            yield b"x"
            await asyncio.sleep(0.01)


def test_slow_client_is_given_up_and_others_are_not_kept_waiting() -> None:
    client = Client(guard={"upload_timeout_s": 0.3, "max_uploads": 2})

    async def run(http: httpx.AsyncClient) -> list[httpx.Response]:
        def trickle() -> tuple[Trickle, asyncio.Task[httpx.Response]]:
            body = Trickle()
            return body, asyncio.create_task(http.post("/v1/captions", content=body))

        body, slow = trickle()
        await body.began.wait()
        quick = await http.post("/v1/captions", content=PICTURE)
        assert not slow.done()
        body, second = trickle()
        await body.began.wait()
        _, third = trickle()
        return [quick, *await asyncio.gather(slow, second, third)]

    quick, slow, second, third = with_http(client.app, run)
    assert quick.status_code == 200
    assert slow.status_code == second.status_code == 408
    assert third.status_code == 503
    assert third.headers["retry-after"] == "1"


@pytest.mark.parametrize("status", [401, 503])
def test_client_that_is_turned_away_cannot_go_on_sending(status: int) -> None:
    tokens = digest_tokens(["right"])
    guard = {"upload_timeout_s": 0.2, "max_uploads": 1, "token_digests": tokens}
    client = Client(guard=guard)

    async def run(http: httpx.AsyncClient) -> list[httpx.Response]:
        async def post(body: Any, token: str) -> httpx.Response:
            headers = {"authorization": f"Bearer {token}"}
            return await http.post("/v1/captions", content=body, headers=headers)

        token = "right" if status == 503 else "wrong"
        busy = Trickle()
        holder = asyncio.create_task(post(busy, "right"))
        await busy.began.wait()
        complete = await post(PICTURE, token)
        assert not holder.done()
        slow = await post(Trickle(), token)
        await holder
        return [slow, complete]

    slow, complete = with_http(client.app, run)
    assert slow.status_code == complete.status_code == status
    assert slow.headers["connection"] == "close"
    assert "connection" not in complete.headers


def test_bytes_held_are_bounded() -> None:
    client = Client(guard={"max_upload_bytes": 30_000})

    async def run(http: httpx.AsyncClient) -> list[httpx.Response]:
        body = Trickle(bytes(20_000))
        first = asyncio.create_task(http.post("/v1/captions", content=body))
        await body.began.wait()
        refused = await http.post("/v1/captions", content=bytes(15_000))
        body.stopped.set()
        return [await first, refused, await http.post("/v1/captions", content=PICTURE)]

    first, refused, later = with_http(client.app, run)
    assert refused.status_code == 503
    assert first.status_code == 400  # complete, if no picture
    assert later.status_code == 200


def through_guard(app: Any, **request: Any) -> tuple[httpx.Response, Counter[str]]:
    rejected: Counter[str] = Counter()
    settings = GuardSettings(max_request_bytes=1000, retry_after_s=7)
    guard = Guard(app, settings, reject=lambda code: rejected.update([code]))
    return with_http(guard, lambda http: http.post("/", **request)), rejected


async def respond(send: Any, status: int, body: bytes, kind: bytes) -> None:
    headers = [(b"content-type", kind)]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def test_request_whose_replica_died_is_repeated_with_its_body() -> None:
    bodies = []

    async def dies_twice(scope: Any, receive: Any, send: Any) -> None:
        bodies.append((await receive())["body"])
        if len(bodies) == 3:
            await respond(send, 200, b"{}", b"application/json")

    answer, rejected = through_guard(dies_twice, content=b"picture")
    assert answer.status_code == 200
    assert bodies == [b"picture"] * 3
    assert not rejected


def test_request_that_no_replica_answers_ends_in_503() -> None:
    async def dies(scope: Any, receive: Any, send: Any) -> None:
        await receive()

    answer, rejected = through_guard(dies, content=b"picture")
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "7"
    assert rejected == {"overloaded": 1}


def test_plain_errors_of_the_proxy_become_json() -> None:
    async def not_found(scope: Any, receive: Any, send: Any) -> None:
        await respond(send, 404, b"Path '/' not found. Ping http://.../-/routes", b"text/plain")

    answer, _ = through_guard(not_found)
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "not_found"


def test_headers_that_switch_off_time_limits_are_taken_away() -> None:
    seen: dict[bytes, bytes] = {}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.update(scope["headers"])
        await respond(send, 200, b"{}", b"application/json")

    headers = {"X-Request-Timeout-Seconds": "0", "x-request-disconnect-disabled": "?1", "a": "b"}
    through_guard(app, headers=headers)
    assert seen[b"a"] == b"b"
    assert not {name for name in seen if name.startswith(b"x-request")}
