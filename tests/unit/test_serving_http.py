"""The HTTP API over a service that only pretends: statuses, limits, tokens, and clients that misbehave."""

import asyncio
import base64
import json
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from captioner.config import DecodeConfig, ServeConfig
from captioner.errors import ConfigError
from captioner.serving.app import create_app, refuse
from captioner.serving.messages import (
    CaptionResponse,
    ImageCaption,
    ModelCard,
    RequestError,
    Timing,
)
from captioner.serving.security import (
    HEADERS,
    TOKENS,
    Guard,
    GuardSettings,
    digest_tokens,
    read_tokens,
)
from captioner.serving.uploads import Upload
from tests.pictures import picture

PICTURE = picture(0)


class Service:
    """Answers with what it was asked."""

    def __init__(self) -> None:
        self.cards = {name: card(name) for name in ("first", "second")}
        self.asked: list[tuple[str, Upload, DecodeConfig]] = []
        self.states = {"first": "ok", "second": "ok"}
        self.error: RequestError | None = None

    async def caption(self, model: str, upload: Upload, decode: DecodeConfig) -> CaptionResponse:
        self.asked.append((model, upload, decode))
        if self.error is not None:
            raise refuse(self.error.status, self.error.code, self.error.message, 0, upload)
        captions = [
            ImageCaption(
                name=name, caption=str(len(data)), log_prob=-1.0, probability=0.3,
                alternatives=[], attention=None,
            )
            for data, name in zip(upload.images, upload.names, strict=True)
        ]  # fmt: skip
        timing = Timing(load_ms=1, wait_ms=1, model_ms=1, total_ms=1, batch_size=1)
        return CaptionResponse(model=model, version="v", captions=captions, timing=timing)

    async def health(self) -> dict[str, str]:
        return self.states

    async def metrics(self) -> str:
        return "ray_captioner_requests_total 1\n"


SEARCHES = {"first": DecodeConfig(), "second": DecodeConfig(beam_size=6, no_repeat_ngram=3)}


def card(name: str) -> ModelCard:
    return ModelCard(
        name=name, version="v", decoder="merge", encoder="resnet50 layer4", vocabulary_size=10,
        attention=False, decode=SEARCHES[name], default=name == "first",
    )  # fmt: skip


class Client:
    """An API with its settings, and what it reported."""

    def __init__(self, guard: dict[str, Any] | None = None, **settings: Any):
        self.service = Service()
        self.rejected: Counter[str] = Counter()
        self.observed: list[tuple[str, str, int]] = []
        self.config = ServeConfig(model=("first=x", "second=y"), **settings)
        self.guard = GuardSettings(**guard or {})
        self.app = create_app(
            self.service,
            self.config,
            self.guard,
            reject=lambda code: self.rejected.update([code]),
            observe=lambda path, method, status, _: self.observed.append((path, method, status)),
        )

    def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.request(method, path, **options)

        return asyncio.run(send())

    def post(self, path: str = "/v1/captions", **options: Any) -> httpx.Response:
        return self.ask("POST", path, **options)


def test_raw_image_is_captioned_by_the_default_model() -> None:
    client = Client()
    answer = client.post(content=PICTURE, headers={"content-type": "image/jpeg"})
    assert answer.status_code == 200
    body = answer.json()
    assert body["model"] == "first"
    assert [one["caption"] for one in body["captions"]] == [str(len(PICTURE))]
    assert {"load_ms", "wait_ms", "model_ms", "total_ms", "batch_size"} == body["timing"].keys()
    assert client.service.asked[0][2] == SEARCHES["first"]
    assert client.observed == [("/v1/captions", "POST", 200)]


def test_form_carries_several_images_and_parameters_that_go_before_the_query() -> None:
    client = Client()
    other = picture(1, "PNG")
    answer = client.post(
        "/v1/captions?beam_size=2&max_length=7",
        files=[("image", ("a.jpg", PICTURE)), ("anything", ("b.png", other))],
        data={"beam_size": "5", "num_captions": "4", "attention": "true", "model": "second"},
    )
    assert answer.status_code == 200, answer.text
    model, upload, decode = client.service.asked[0]
    assert model == "second"
    assert upload.images == [PICTURE, other]
    assert upload.names == ["a.jpg", "b.png"]
    assert upload.parameters.attention
    asked = {"beam_size": 5, "num_captions": 4, "max_length": 7}
    assert decode == SEARCHES["second"].model_copy(update=asked)


@pytest.mark.parametrize(
    ("query", "beams", "captions"),
    [("", 3, 1), ("num_captions=5", 5, 5), ("num_captions=2", 3, 2), ("beam_size=1", 1, 1)],
)
def test_beams_and_captions_fit_each_other(query: str, beams: int, captions: int) -> None:
    client = Client()
    assert client.post(f"/v1/captions?{query}", content=PICTURE).status_code == 200
    decode = client.service.asked[0][2]
    assert (decode.beam_size, decode.num_captions) == (beams, captions)


@pytest.mark.parametrize(
    ("content", "status", "code", "advice"),
    [
        (b"hello", 400, "not_an_image", "send JPEG, PNG, WEBP, GIF"),
        (b"", 400, "no_image", "send its bytes"),
        (picture(0, "BMP"), 415, "type_not_allowed", "bmp are not accepted: send JPEG"),
        (picture(0, "TIFF"), 415, "type_not_allowed", "tiff"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 415, "type_not_allowed", "SVG"),
        (b"\0\0\0\x1cftypheic", 415, "type_not_allowed", "HEIC"),
        (b"RIFF\0\0\0\0WAVEfmt ", 400, "not_an_image", "send"),
        (PICTURE + bytes(50_000), 413, "image_too_large", "limit of 50000"),
    ],
)
def test_bad_image_gets_its_status_and_advice(
    content: bytes, status: int, code: str, advice: str
) -> None:
    client = Client(limits={"max_bytes": 50_000})
    answer = client.post(content=content)
    assert answer.status_code == status
    assert answer.json()["error"]["code"] == code
    assert advice in answer.json()["error"]["message"]
    assert client.rejected == {code: 1}
    assert not client.service.asked


def test_allow_list_is_a_setting() -> None:
    client = Client(types=("bmp",))
    assert client.post(content=picture(0, "BMP")).status_code == 200
    assert client.post(content=PICTURE).status_code == 415


def test_declared_type_is_never_believed() -> None:
    client = Client()
    good = client.post(content=PICTURE, headers={"content-type": "text/plain"})
    bad = client.post(content=b"GIF8x", headers={"content-type": "image/gif"})
    assert (good.status_code, bad.status_code) == (200, 400)


def test_bad_image_among_several_is_named() -> None:
    files = [("image", ("good.jpg", PICTURE)), ("image", ("notes.jpg", b"text"))]
    answer = Client().post(files=files)
    assert answer.status_code == 400
    assert "image 2 of 2 (notes.jpg)" in answer.json()["error"]["message"]


def test_refusal_by_the_model_keeps_its_status() -> None:
    client = Client()
    client.service.error = RequestError(413, "image_too_large", "60000x60000 pixels")
    answer = client.post(content=PICTURE)
    assert answer.status_code == 413
    assert "60000x60000" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("query", "named"),
    [
        ("beam_size=0", "beam_size: Input should be greater than or equal to 1 (got '0')"),
        ("beam_size=x", "beam_size"),
        ("num_captions=33", "num_captions"),
        ("max_length=201", "max_length"),
        ("attention=perhaps", "attention"),
        ("beam_size=2&num_captions=3", "num_captions: 3 must be at most beam_size 2"),
        ("beams=3", "beams"),
        ("model=third", "'third' is not one of first, second"),
    ],
)
def test_bad_parameter_is_422_and_named(query: str, named: str) -> None:
    client = Client()
    answer = client.post(f"/v1/captions?{query}", content=PICTURE)
    assert answer.status_code == 422
    assert named in answer.json()["error"]["message"]
    field, _, value = query.partition("=")
    if "&" not in query:
        form = client.post(files={"image": ("a.jpg", PICTURE)}, data={field: value})
        assert form.status_code == 422
        assert field in form.json()["error"]["message"]


def test_damaged_form_is_400() -> None:
    kind = {"content-type": "multipart/form-data; boundary=x"}
    for content, headers in (
        (b"--x\r\nno headers", kind),
        (b"--x\r\nContent-Disposition: form-data\r\n\r\n1\r\n--x--", kind),
        (PICTURE, {"content-type": "multipart/form-data"}),
    ):
        answer = Client().post(content=content, headers=headers)
        assert answer.status_code == 400, answer.text


def test_too_many_images_are_413() -> None:
    files = [("image", (f"{n}.jpg", PICTURE)) for n in range(4)]
    answer = Client(max_images=3).post(files=files)
    assert answer.status_code == 413
    assert "limit of 3" in answer.json()["error"]["message"]


def test_other_paths_and_methods_answer_in_json() -> None:
    client = Client()
    assert client.ask("GET", "/nothing").json()["error"]["code"] == "not_found"
    assert client.ask("GET", "/docs").status_code == 404
    answer = client.ask("GET", "/v1/captions")
    assert answer.status_code == 405
    assert answer.json()["error"]["code"] == "method_not_allowed"


def test_models_health_and_metrics() -> None:
    client = Client()
    models = client.ask("GET", "/v1/models").json()["models"]
    assert [(one["name"], one["default"]) for one in models] == [("first", True), ("second", False)]
    assert client.ask("GET", "/metrics").text.startswith("ray_captioner_requests_total")
    assert client.ask("GET", "/healthz").json()["status"] == "ready"
    client.service.states["second"] = "no replica answers"
    sick = client.ask("GET", "/healthz")
    assert sick.status_code == 503
    assert sick.headers["retry-after"] == "1"
    assert sick.json()["models"]["second"] == "no replica answers"


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


def test_slow_client_is_given_up_and_others_are_not_kept_waiting() -> None:
    client = Client(guard={"upload_timeout_s": 0.3, "max_uploads": 2})

    async def trickle() -> AsyncIterator[bytes]:
        while True:
            yield b"x"
            await asyncio.sleep(0.05)

    async def run() -> list[httpx.Response]:
        transport = httpx.ASGITransport(client.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            slow = asyncio.create_task(http.post("/v1/captions", content=trickle()))
            await asyncio.sleep(0.1)
            quick = await http.post("/v1/captions", content=PICTURE)
            assert not slow.done()
            more = [
                asyncio.create_task(http.post("/v1/captions", content=trickle())) for _ in range(2)
            ]
            await asyncio.sleep(0.05)
            return [quick, *await asyncio.gather(slow, *more)]

    quick, slow, second, third = asyncio.run(run())
    assert quick.status_code == 200
    assert slow.status_code == second.status_code == 408
    assert third.status_code == 503
    assert third.headers["retry-after"] == "1"


@pytest.mark.parametrize("guard", [{"max_uploads": 0}, {"token_digests": ("x",)}])
def test_client_that_is_turned_away_cannot_go_on_sending(guard: dict[str, Any]) -> None:
    client = Client(guard={"upload_timeout_s": 0.2} | guard)

    async def trickle() -> AsyncIterator[bytes]:
        while True:
            yield b"x"
            await asyncio.sleep(0.05)

    slow = client.post(content=trickle())
    assert slow.status_code in (401, 503)
    assert slow.headers["connection"] == "close"
    complete = client.post(content=PICTURE)
    assert complete.status_code == slow.status_code
    assert "connection" not in complete.headers


def test_bytes_held_are_bounded() -> None:
    client = Client(guard={"max_upload_bytes": 30_000})

    async def run() -> tuple[httpx.Response, httpx.Response, httpx.Response]:
        released = asyncio.Event()

        async def held() -> AsyncIterator[bytes]:
            yield bytes(20_000)
            await released.wait()

        transport = httpx.ASGITransport(client.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            first = asyncio.create_task(http.post("/v1/captions", content=held()))
            await asyncio.sleep(0.1)
            refused = await http.post("/v1/captions", content=bytes(15_000))
            released.set()
            return await first, refused, await http.post("/v1/captions", content=PICTURE)

    first, refused, later = asyncio.run(run())
    assert refused.status_code == 503
    assert first.status_code == 400  # complete, if no picture
    assert later.status_code == 200


def through_guard(app: Any, **request: Any) -> tuple[httpx.Response, Counter[str]]:
    rejected: Counter[str] = Counter()
    settings = GuardSettings(max_request_bytes=1000, retry_after_s=7)
    guard = Guard(app, settings, reject=lambda code: rejected.update([code]))

    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(guard)  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            return await http.post("/", **request)

    return asyncio.run(run()), rejected


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


def test_openapi_describes_answers_and_errors_with_examples() -> None:
    document = Client().ask("GET", "/openapi.json").json()
    post = document["paths"]["/v1/captions"]["post"]
    assert {"200", "400", "401", "408", "413", "415", "422", "503"} == post["responses"].keys()
    parameters = {parameter["name"]: parameter["schema"] for parameter in post["parameters"]}
    assert parameters.keys() == {"model", "beam_size", "num_captions", "max_length", "attention"}
    beams = DecodeConfig.model_json_schema()["properties"]["beam_size"]
    assert parameters["beam_size"]["anyOf"][0]["maximum"] == beams["maximum"]
    assert parameters["beam_size"]["description"] == beams["description"]
    for status, response in post["responses"].items():
        example = response["content"]["application/json"]["example"]
        assert ("captions" if status == "200" else "error") in example
    example = post["responses"]["200"]["content"]["application/json"]["example"]
    CaptionResponse.model_validate_json(json.dumps(example))
    assert {"multipart/form-data", "image/jpeg"} <= post["requestBody"]["content"].keys()
