"""What stands between the network and the API: tokens, bounds, clients that misbehave, replicas that die."""

import asyncio
import base64
import re
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from captioner.config import ServeConfig
from captioner.errors import ConfigError
from captioner.serving.guard import HEADERS, Guard, GuardSettings, access_logger, drain
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
    [
        "Bearer right",
        "bearer also",
        "Basic " + base64.b64encode(b"me:right").decode(),
        "Bearer zwölf",
        "Basic " + base64.b64encode("me:zwölf".encode("latin-1")).decode(),
        "Basic " + base64.b64encode("me:zwölf".encode()).decode(),
    ],
)
def test_any_of_the_tokens_opens_everything(header: str) -> None:
    client = Client(guard={"token_digests": digest_tokens(["right", "also", "zwölf"])})
    for sent in (header.encode(), header.encode("latin-1")):
        headers = {"authorization": sent}
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
    file.write_text(
        "\ufeffone  \r\n# tokens of the team, not one of them\n\n\ttwo \n  # four\nzwölf\n"
    )
    monkeypatch.setenv(TOKENS, "three")
    assert read_tokens(str(file)) == ["three", "one", "two", "zwölf"]
    config = ServeConfig(model=("x",), token_file=str(file))
    assert "zwölf" not in GuardSettings.of(config).model_dump_json()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (" \n# nothing\n", "token_file: there is no token"),
        ("alice\nalice 8f3c9e\n", "token_file: line 2 has several words"),
        ("ali\0ce", "token_file: line 1 has a character that nobody can send"),
    ],
)
def test_file_that_holds_no_tokens_is_refused_and_none_of_it_told(
    tmp_path: Any, text: str, message: str
) -> None:
    file = tmp_path / "tokens"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        read_tokens(str(file))
    assert "alice" not in str(error.value)


def test_variable_is_read_as_the_file_is(monkeypatch: Any, tmp_path: Any) -> None:
    for text in ("", " # nothing", "one two"):
        monkeypatch.setenv(TOKENS, text)
        with pytest.raises(ConfigError, match=TOKENS):
            read_tokens(None)
    monkeypatch.setenv(TOKENS, "\ufeffone\r\ntwo")
    assert read_tokens(None) == ["one", "two"]
    (tmp_path / "tokens").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is not text"):
        read_tokens(str(tmp_path / "tokens"))


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


@pytest.mark.parametrize(
    ("length", "status"),
    [(b"0" * 5000 + b"1", 200), (b"0" * 5000 + b"2000", 413), (b"9" * 5000, 413)],
)
def test_length_of_any_number_of_digits_is_a_number(length: bytes, status: int) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await respond(send, 200, b"{}", b"application/json")

    answer, _ = through_guard(app, content=b"x", headers={"content-length": length})
    assert answer.status_code == status


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
    guard = Guard(app, settings, lambda code: rejected.update([code]), lambda *_: None)
    return with_http(guard, lambda http: http.post("/", **request)), rejected


async def respond(send: Any, status: int, body: bytes, kind: bytes) -> None:
    headers = [(b"content-type", kind)]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def test_request_whose_replica_died_is_repeated_with_its_body() -> None:
    bodies = []

    async def dies_once(scope: Any, receive: Any, send: Any) -> None:
        bodies.append((await receive())["body"])
        if len(bodies) == 2:
            await respond(send, 200, b"{}", b"application/json")

    answer, rejected = through_guard(dies_once, content=b"picture")
    assert answer.status_code == 200
    assert bodies == [b"picture"] * 2
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


def test_headers_that_rule_ray_serves_proxy_are_taken_away() -> None:
    seen: dict[bytes, bytes] = {}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.update(scope["headers"])
        await respond(send, 200, b"{}", b"application/json")

    headers = {
        "X-Request-Timeout-Seconds": "0", "x-request-disconnect-disabled": "?1", "x_session-id": "c",
        "serve_multiplexed_model_id": "d", "Serve-Multiplexed-Model-ID": "e", "a": "b",
    }  # fmt: skip
    through_guard(app, headers=headers)
    assert seen[b"a"] == b"b"
    assert {one for one in seen if one.startswith((b"x", b"serve"))} == {b"x-request-id"}


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (None, "[0-9a-f]{32}"),
        (b"", "[0-9a-f]{32}"),
        (b"of-the-client", "of-the-client"),
        (b"two\t words", "two_words"),
        (b"\xff\xfe", r"\\xff\\xfe"),
        ("é".encode() * 200, r"(\\xc3\\xa9){8}"),
    ],
)
def test_every_answer_names_its_request(given: bytes | None, named: str) -> None:
    seen: list[bytes] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.extend(value for name, value in scope["headers"] if name == b"x-request-id")
        await respond(send, 404, b"no", b"text/plain")

    answer, _ = through_guard(app, headers={} if given is None else {"X-Request-ID": given})
    found = answer.headers["x-request-id"]
    assert re.fullmatch(named, found)
    assert seen == [found.encode()]


def test_health_is_answered_whatever_else_there_is_to_do() -> None:
    client = Client(guard={"max_uploads": 1, "max_upload_bytes": 10})

    async def run(http: httpx.AsyncClient) -> list[int]:
        body = Trickle(bytes(20))
        holder = asyncio.create_task(http.post("/v1/captions", content=body))
        await body.began.wait()
        answers = [await http.get(path) for path in ("/healthz", "/v1/models", "/healthz")]
        body.stopped.set()
        await holder
        return [one.status_code for one in answers]

    assert with_http(client.app, run) == [200, 503, 200]


def test_fault_is_a_500_that_is_counted_once_and_logged_with_its_id(
    caplog: pytest.LogCaptureFixture,
) -> None:
    client = Client()

    async def fail(*_: Any) -> Any:
        raise ZeroDivisionError("in the middle")

    client.service.caption = fail  # type: ignore[method-assign]
    answer = client.post(content=PICTURE, headers={"x-request-id": "seven"})
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "error"
    assert client.observed == [("/v1/captions", "POST", 500)]
    assert client.rejected == {"error": 1}
    assert "request seven failed" in caplog.text
    assert "ZeroDivisionError: in the middle" in caplog.text


def test_request_is_counted_by_the_first_guard_that_it_passes() -> None:
    observed: Counter[tuple[str, str, int]] = Counter()
    rejected: Counter[str] = Counter()
    inside = Client()
    outside = Guard(
        inside.app,
        GuardSettings(max_request_bytes=50_000, token_digests=digest_tokens(["right"])),
        lambda code: rejected.update([code]),
        lambda path, method, status, _: observed.update([(path, method, status)]),
    )

    async def run(http: httpx.AsyncClient) -> None:
        asked = [("right", PICTURE), ("wrong", PICTURE), ("right", b"x"), ("right", bytes(60_000))]
        for token, content in asked:
            headers = {"authorization": f"Bearer {token}"}
            await http.post("/v1/captions", content=content, headers=headers)
        await http.get("/secret/path", headers={"authorization": "Bearer right"})

    with_http(outside, run)
    statuses = {200: 1, 401: 1, 400: 1, 413: 1}
    expected = {("/v1/captions", "POST", status): n for status, n in statuses.items()}
    assert observed == expected | {("other", "GET", 404): 1}
    assert not inside.observed
    assert rejected + inside.rejected == {
        "unauthorized": 1, "not_an_image": 1, "request_too_large": 1, "not_found": 1,
    }  # fmt: skip


def test_access_log_has_a_line_a_request_without_tokens_or_names(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access_logger, "handlers", [])
    client = Client(guard={"access_log": True, "token_digests": digest_tokens(["secret"])})
    headers = {"authorization": "Bearer secret", "x-request-id": "seven"}
    client.post(
        "/v1/captions?model=first", files={"image": ("patient.jpg", PICTURE)}, headers=headers
    )
    client.ask("GET", "/patient.jpg?token=secret", headers=headers)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[:4] for line in lines] == [
        ["seven", "POST", "/v1/captions", "200"], ["seven", "GET", "other", "404"],
    ]  # fmt: skip
    assert not [line for line in lines if "patient" in line or "secret" in line]


def test_end_waits_for_what_is_under_way_and_lets_nothing_in(tmp_path: Path) -> None:
    async def main() -> tuple[int, int, int, bool]:
        client = Client(guard={"drain_folder": str(tmp_path)})
        transport = httpx.ASGITransport(client.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            before = await http.get("/healthz")
            body = Trickle()
            under_way = asyncio.create_task(http.post("/v1/captions", content=body))
            await body.began.wait()
            ended = asyncio.create_task(
                asyncio.to_thread(drain, tmp_path, lambda seconds: bool(time.sleep(seconds)), 20)
            )
            await asyncio.sleep(0.5)
            refused = await http.post("/v1/captions", content=PICTURE)
            assert refused.headers["connection"] == "close"
            waited = not ended.done()
            body.stopped.set()
            await ended
            return before.status_code, refused.status_code, (await under_way).status_code, waited

    assert asyncio.run(main()) == (200, 503, 400, True)
