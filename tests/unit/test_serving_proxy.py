"""What Ray Serve's HTTP proxies get from us before they start their server."""

import asyncio
import contextlib
import json
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
import uvloop

from captioner.serving import connection
from captioner.serving.connection import BoundedProtocol, TlsProtocol, make_connection
from captioner.serving.guard import Guard, GuardSettings
from captioner.serving.proxy import SETTINGS, bound_connections, middlewares, proxy_settings
from captioner.serving.tokens import TOKENS, digest_tokens
from tests.certificate import write_certificate


@pytest.fixture(autouse=True)
def untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uvicorn.config, "HTTP_PROTOCOLS", dict(uvicorn.config.HTTP_PROTOCOLS))
    monkeypatch.setattr(uvicorn.config, "create_ssl_context", uvicorn.config.create_ssl_context)
    monkeypatch.setattr(TlsProtocol, "context", None)
    monkeypatch.delenv(SETTINGS, raising=False)
    monkeypatch.delenv(TOKENS, raising=False)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    found: Counter[str] = Counter()
    monkeypatch.setattr(connection, "count_rejected", lambda code: found.update([code]))
    monkeypatch.setattr(connection, "count_request", lambda *_: None)
    return found


def test_servers_made_afterwards_cut_off_slow_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SETTINGS, GuardSettings(upload_timeout_s=7).model_dump_json())
    middlewares()
    config = uvicorn.Config(lambda: None, factory=True, log_config=None)  # as Ray Serve makes it
    config.load()
    assert config.http_protocol_class is make_connection
    assert BoundedProtocol.settings.upload_timeout_s == 7


@pytest.mark.parametrize("variable", [SETTINGS, TOKENS])
def test_tokens_come_from_the_environment_of_the_node(
    monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    settings = GuardSettings(token_digests=("x",)).model_dump_json()
    monkeypatch.setenv(variable, settings if variable == SETTINGS else "secret")
    [one] = middlewares()
    assert one.cls is Guard
    kept: Any = one.kwargs["settings"]
    assert len(kept.token_digests) == 1
    assert "secret" not in kept.token_digests


def test_bounds_in_the_environment_leave_its_tokens_in_force(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(SETTINGS, '{"max_connections_per_address": 7, "token_digests": []}')
    monkeypatch.setenv(TOKENS, "secret")
    settings = proxy_settings()
    assert settings.max_connections_per_address == 7
    assert settings.token_digests == digest_tokens(["secret"])


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answers with the number of bytes that came."""
    size, more = 0, True
    while more:
        message = await receive()
        size, more = size + len(message.get("body", b"")), message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"x", b"y")]})
    await send({"type": "http.response.body", "body": b"got %d" % size})


@asynccontextmanager
async def listening(
    application: Any = app, certificate: tuple[str, str] | None = None, **bounds: Any
) -> AsyncIterator[int]:
    """The port of a server like Ray Serve's, of our protocol."""
    BoundedProtocol.settings = GuardSettings(**bounds)
    BoundedProtocol.addresses.clear()
    BoundedProtocol.reserve.clear()
    bound_connections()
    ssl_certfile, ssl_keyfile = certificate or (None, None)
    config = uvicorn.Config(
        lambda: application, factory=True, port=0, log_config=None, access_log=False, lifespan="off",
        ssl_certfile=ssl_certfile, ssl_keyfile=ssl_keyfile,
    )  # fmt: skip
    server = uvicorn.Server(config)
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    task = asyncio.create_task(server._serve())
    while not server.started:
        await asyncio.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = server.force_exit = True
    await task


async def say(port: int, *pieces: bytes) -> bytes:
    """All that comes back until the connection ends, or nothing comes for a while."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.01)
    except ConnectionError:
        pass
    found = b""
    try:
        while piece := await asyncio.wait_for(reader.read(65536), 0.7):
            found += piece
    except (ConnectionError, TimeoutError):
        pass
    writer.close()
    return found


def run(
    talk: Callable[[int], Awaitable[None]],
    application: Any = app,
    new_loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop,
    **bounds: Any,
) -> None:
    async def main() -> None:
        async with listening(application, **bounds) as port:
            await talk(port)

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(main())


GET = b"GET / HTTP/1.1\r\nHost: x\r\n"
POST = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "pieces",
    [
        [GET + b"X: " + bytes([97]) * 3000 + b"\r\n\r\n"],
        [GET, *(b"X%d: y\r\n" % number for number in range(500)), b"\r\n"],
        [GET + b"X: ", *[bytes([97]) * 1000] * 4],
        [b"GET /" + bytes([97]) * 3000 + b" HTTP/1.1\r\nHost: x\r\n\r\n"],
    ],
    ids=["one", "many", "endless", "path"],
)
def test_headers_over_the_limit_get_431_and_are_not_kept(
    pieces: list[bytes], counted: Counter[str]
) -> None:
    async def talk(port: int) -> None:
        answer = await say(port, *pieces)
        if answer:  # what is still on its way may take the answer with it
            assert answer.startswith(b"HTTP/1.1 431 ")
            body = json.loads(answer.partition(b"\r\n\r\n")[2])
            assert body["error"]["code"] == "headers_too_large"
            assert "at most 2048 bytes" in body["error"]["message"]
            assert b"retry-after" not in answer
        assert counted == {"headers_too_large": 1}
        assert b"got 0" in await say(port, GET + b"\r\n")

    run(talk, max_header_bytes=2048)


def test_bodies_are_no_headers_and_trailers_are(counted: Counter[str]) -> None:
    async def talk(port: int) -> None:
        chunk = b"2710\r\n" + bytes(10_000) + b"\r\n"
        assert b"got 50000" in await say(port, POST, *[chunk] * 5, b"0\r\n\r\n")
        assert not counted
        await say(port, POST, chunk, b"0\r\n", *[b"X: " + bytes([97]) * 1000 + b"\r\n"] * 8)
        assert counted == {"headers_too_large": 1}

    run(talk, max_header_bytes=2048)


def test_connections_are_bounded_and_their_places_free_again(counted: Counter[str]) -> None:
    async def talk(port: int) -> None:
        for _ in range(2):
            held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
            await asyncio.sleep(0.1)
            refused = await say(port, GET + b"\r\n")
            assert refused.startswith(b"HTTP/1.1 503 ")
            assert b"retry-after: 1\r\n" in refused
            for _, writer in held:
                writer.close()
            await asyncio.sleep(0.1)
            assert b"got 0" in await say(port, GET + b"\r\n")
        assert counted == {"overloaded": 2}

    run(talk, max_connections_per_address=3)
    counted.clear()
    run(talk, max_connections=3)


@pytest.mark.parametrize("bound", ["max_connections", "max_connections_per_address"])
def test_health_is_answered_beyond_the_bounds_and_nothing_else(
    bound: str, counted: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "_RESERVE_S", 0.3)

    async def talk(port: int) -> None:
        first = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.sleep(0.1)
        for path in (b"/healthz", b"/-/healthz", b"/healthz?x=1"):
            asked = b"GET " + path + b" HTTP/1.1\r\nHost: x\r\n\r\n"
            # Whatever follows on the same connection finds it closed.
            assert (await say(port, asked + asked)).count(b"got 0") == 1
        assert not counted
        silent = [asyncio.create_task(say(port)) for _ in range(6)]
        await asyncio.sleep(0.1)
        assert counted == {"overloaded": 2}  # more than an address may have beyond the bounds
        assert all(one.startswith(b"HTTP/1.1 503 ") for one in await asyncio.gather(*silent))
        assert counted == {"overloaded": 6}
        assert BoundedProtocol.reserve.total() == 0
        first[1].close()

    run(talk, **{bound: 1})


def test_requests_sent_ahead_are_bounded(counted: Counter[str]) -> None:
    seen: list[Any] = []
    go = asyncio.Event()

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope)
        await go.wait()
        await app(scope, receive, send)

    async def talk(port: int) -> None:
        pieces = [b"POST /%d HTTP/1.1\r\nHost: x\r\nN: %d\r\nContent-Length: 1\r\n\r\n." % (n, n)
                  for n in range(5000)]  # fmt: skip
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"".join(pieces))
        await asyncio.sleep(0.3)
        go.set()
        found = b""
        with contextlib.suppress(ConnectionError):  # more is sent than is ever read
            while piece := await asyncio.wait_for(reader.read(65536), 5):
                found += piece
        writer.close()
        assert found.count(b"got 1") == 9
        assert [one["path"] for one in seen] == [f"/{n}" for n in range(9)]
        assert [dict(one["headers"])[b"n"] for one in seen] == [b"%d" % n for n in range(9)]
        assert len(seen[-1]["headers"]) == 3

    run(talk, slow)


def test_what_follows_a_request_takes_no_answer_from_it(counted: Counter[str]) -> None:
    async def talk(port: int) -> None:
        for wrong in (b"no HTTP\r\n\r\n", GET + b"X: " + 3000 * b"a" + b"\r\n\r\n"):
            answer = await say(port, GET + b"\r\n" + wrong)
            assert answer.startswith(b"HTTP/1.1 200 ")
            assert answer.count(b"HTTP/1.1 ") == 1
        assert not counted

    run(talk, max_header_bytes=2048)


def test_damaged_body_is_told_and_its_answer_is_named_and_logged(
    counted: Counter[str], caplog: pytest.LogCaptureFixture
) -> None:
    async def talk(port: int) -> None:
        answer = await say(port, POST, b"FFFFFFFFFFFFFFFFF\r\n")
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert counted == {"bad_request": 1}
        assert b"retry-after" not in answer
        [request_id] = [
            line.partition(b": ")[2].decode()
            for line in answer.split(b"\r\n")
            if line.startswith(b"x-request-id: ")
        ]
        [line] = [one.getMessage() for one in caplog.records if one.name == "captioner.access"]
        assert line == f"{request_id} other other 400 0 ms"

    with caplog.at_level("INFO", "captioner.access"):
        run(talk, access_log=True)


def test_web_sockets_take_no_connection_out_of_the_bounds(counted: Counter[str]) -> None:
    upgrade = (
        b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )

    async def talk(port: int) -> None:
        for _ in range(5):
            assert b" 101 " not in await say(port, GET + upgrade)
        await asyncio.sleep(0.1)
        assert BoundedProtocol.addresses.total() == 0

    run(talk, max_connections=2)


def test_what_is_no_request_is_told_in_json(counted: Counter[str]) -> None:
    async def talk(port: int) -> None:
        answer = await say(port, b"\x16\x03\x01 this is TLS\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "bad_request"

    run(talk)


@pytest.mark.parametrize(
    "new_loop", [asyncio.new_event_loop, uvloop.new_event_loop]
)  # Ray takes uvloop
def test_the_same_holds_behind_a_certificate(
    new_loop: Callable[[], asyncio.AbstractEventLoop], tmp_path: Path, counted: Counter[str]
) -> None:
    certificate = write_certificate(tmp_path)
    trusting = ssl.create_default_context(cafile=certificate[0])

    async def talk(port: int) -> None:
        async with httpx.AsyncClient(verify=trusting, base_url=f"https://127.0.0.1:{port}") as http:
            assert (await http.post("/", content=bytes(100_000))).text == "got 100000"
            assert (await http.get("/", headers={"x": 3000 * "a"})).status_code == 431
        held = [await asyncio.open_connection("127.0.0.1", port, ssl=trusting) for _ in range(3)]
        assert counted == {"headers_too_large": 1}
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=trusting)
        writer.write(GET + b"\r\n")
        assert (await reader.read(100)).startswith(b"HTTP/1.1 503 ")
        assert counted["overloaded"] == 1
        writer.close()
        for _, writer in held:
            writer.close()
        await asyncio.sleep(0.2)
        assert BoundedProtocol.addresses.total() == 0
        # Without a word of TLS, in rubbish, and in the middle of a handshake.
        silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(20)]
        for number, (_, writer) in enumerate(silent):
            writer.write([b"", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01"][number % 3])
        await asyncio.sleep(0.2)
        assert BoundedProtocol.addresses.total() <= 3
        assert BoundedProtocol.reserve.total() <= 4
        ended = await asyncio.wait_for(
            asyncio.gather(*(reader.read() for reader, _ in silent), return_exceptions=True), 5
        )
        assert len(ended) == 20
        for _, writer in silent:
            writer.close()
        await asyncio.sleep(0.1)
        assert BoundedProtocol.addresses.total() == BoundedProtocol.reserve.total() == 0
        async with httpx.AsyncClient(verify=trusting, base_url=f"https://127.0.0.1:{port}") as http:
            assert (await http.post("/", content=bytes(100_000))).text == "got 100000"

    bounds = {"max_header_bytes": 2048, "max_connections": 3, "upload_timeout_s": 1}
    run(talk, new_loop=new_loop, certificate=certificate, **bounds)
