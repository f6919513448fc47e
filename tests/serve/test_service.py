"""The service as its clients meet it: right captions in any batch, refusals, overload, deaths and new versions."""

import asyncio
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import httpx
import pytest
import torch
import yaml
from ray.serve.schema import ServeDeploySchema

from captioner.captioning.captioner import Captioner
from captioner.config import DecodeConfig, ServeConfig
from tests.head import ROOT
from tests.pictures import bomb, picture
from tests.serve.service import Service

# The first test waits for the head and two models; a busy machine takes minutes.
pytestmark = pytest.mark.timeout(900)

PICTURES = [picture(number, kind) for number in range(8) for kind in ("JPEG", "PNG", "WEBP")]


@pytest.fixture(scope="module")
def captioner(models: dict[str, str]) -> Captioner:
    # The service has the cores: more threads than are free wait for each other.
    torch.set_num_threads(1)
    return Captioner.load(models["v1"], device="cpu")


async def post(
    session: aiohttp.ClientSession, service: Service, data: bytes, query: str = ""
) -> tuple[int, dict[str, Any], float]:
    """Status, body and Retry-After (0 where there is none)."""
    async with session.post(f"{service.url}/v1/captions{query}", data=data) as answer:
        return answer.status, await answer.json(), float(answer.headers.get("Retry-After", 0))


def run_many(
    service: Service, requests: list[tuple[bytes, str]]
) -> list[tuple[int, dict[str, Any], float]]:
    """All at once."""

    async def run() -> list[tuple[int, dict[str, Any], float]]:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as session:
            return await asyncio.gather(*(post(session, service, *one) for one in requests))

    return asyncio.run(run())


class Load:
    """Clients that caption one picture after another while a block runs; few, or what is to start would get no core."""

    def __init__(self, service: Service, clients: int = 2):
        self.service, self.clients = service, clients
        self.statuses: Counter[int] = Counter()
        self.codes: Counter[str] = Counter()
        self.answers: list[tuple[int, str, str]] = []
        self.broken: list[str] = []
        self._answered = threading.Semaphore(0)

    async def during(self, action: Callable[[], None]) -> None:
        stop = asyncio.Event()

        async def client(first: int) -> None:
            async with aiohttp.ClientSession() as session:
                number = first
                while not stop.is_set():
                    number = (number + 1) % len(PICTURES)
                    try:
                        status, body, _ = await post(session, self.service, PICTURES[number])
                    except aiohttp.ClientError as error:
                        self.broken.append(repr(error))
                        continue
                    self.statuses[status] += 1
                    if status == 200:
                        text = body["captions"][0]["caption"]
                        self.answers.append((number, body["version"], text))
                    else:
                        self.codes[body["error"]["code"]] += 1
                    self._answered.release()

        clients = [asyncio.create_task(client(7 * number)) for number in range(self.clients)]
        await asyncio.to_thread(action)
        stop.set()
        await asyncio.gather(*clients)

    def wait(self, answers: int) -> None:
        """Until that many have come from now on."""
        while self._answered.acquire(blocking=False):
            pass
        for _ in range(answers):
            assert self._answered.acquire(timeout=300)


def test_caption_is_the_captioners_whatever_shares_its_batch(
    service: Service, captioner: Captioner
) -> None:
    searches = [DecodeConfig(), DecodeConfig(beam_size=1), DecodeConfig(beam_size=5, max_length=9)]
    queries = ["", "?beam_size=1", "?beam_size=5&max_length=9&num_captions=2"]
    expected = [
        captioner.caption([data], search)[0]
        for data, search in zip(PICTURES, 8 * searches, strict=True)
    ]
    assert len({caption.text for caption in expected}) > 5
    requests = list(zip(PICTURES, 8 * queries, strict=True))
    answers = run_many(service, requests)
    assert {status for status, _, _ in answers} == {200}
    for caption, (_, body, _) in zip(expected, answers, strict=True):
        found = body["captions"][0]
        assert found["caption"] == caption.text
        assert found["log_prob"] == pytest.approx(caption.log_prob, abs=1e-3)
    assert max(body["timing"]["batch_size"] for _, body, _ in answers) > 1
    assert len(answers[2][1]["captions"][0]["alternatives"]) == 1


def test_images_of_one_request_keep_their_order(service: Service, captioner: Captioner) -> None:
    files = [("image", (f"{number}.jpg", data)) for number, data in enumerate(PICTURES[:6])]
    answer = httpx.post(f"{service.url}/v1/captions", files=files, timeout=60)
    assert answer.status_code == 200, answer.text
    found = answer.json()["captions"]
    assert [one["name"] for one in found] == [f"{number}.jpg" for number in range(6)]
    texts = [captioner.caption([data])[0].text for data in PICTURES[:6]]
    assert [one["caption"] for one in found] == texts


def test_model_from_s3_says_where_it_looked(service: Service) -> None:
    answer = service.caption(PICTURES[0], model="places", attention=True).json()
    found = answer["captions"][0]
    assert answer["model"] == "places"
    assert [one["word"] for one in found["attention"]] == found["caption"].split()
    for one in found["attention"]:
        assert [len(row) for row in one["weights"]] == [5] * 3
        assert sum(map(sum, one["weights"])) == pytest.approx(1, abs=1e-3)
    assert found["attention_box"] == [0, 0, 1, 1]
    plain = service.caption(PICTURES[0], model="places").json()["captions"][0]
    assert plain["attention"] is None
    assert plain["caption"] == found["caption"]


@pytest.mark.parametrize(
    ("data", "status", "code"),
    [
        (bomb(), 413, "image_too_large"),
        (picture(0, size=(400, 300))[:-400], 400, "not_an_image"),
        (bytes(400_001), 413, "image_too_large"),
        (bytes(1_000_001), 413, "request_too_large"),
        (b"text", 400, "not_an_image"),
        (picture(0, "BMP"), 415, "type_not_allowed"),
    ],
)
def test_bad_image_is_refused_with_advice(
    service: Service, data: bytes, status: int, code: str
) -> None:
    answer = service.caption(data)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


def test_models_and_health(service: Service, models: dict[str, str]) -> None:
    found = httpx.get(f"{service.url}/v1/models").json()["models"]
    assert [(one["name"], one["default"], one["attention"]) for one in found] == [
        ("words", True, False),
        ("places", False, True),
    ]
    health = httpx.get(f"{service.url}/healthz")
    assert health.json() == {"status": "ready", "models": {"words": "ok", "places": "ok"}}


def connect(service: Service) -> socket.socket:
    address = urlsplit(service.url)
    return socket.create_connection((address.hostname, address.port), timeout=15)


def test_clients_that_stop_are_cut_off(service: Service) -> None:
    stops = {
        b"": b"",
        b"POST /v1/captions HTTP/1.1\r\nHost: x\r\nX-Slow: ": b"",
        b"POST /v1/captions HTTP/1.1\r\nHost: x\r\nContent-Length: 90\r\n\r\n123": b" 408 ",
    }
    started = time.monotonic()
    with ExitStack() as stack:
        connections = [stack.enter_context(connect(service)) for _ in stops]
        for connection, sent in zip(connections, stops, strict=True):
            connection.sendall(sent)
        for connection, answered in zip(connections, stops.values(), strict=True):
            answer = b""
            try:
                while piece := connection.recv(4096):
                    answer += piece
            except ConnectionResetError:
                pass
            assert answered in answer
    assert time.monotonic() - started < 8


def test_more_than_fits_the_queue_gets_503_and_a_time_to_come_back(service: Service) -> None:
    answers = run_many(service, [(data, "?beam_size=8") for data in 8 * PICTURES])
    statuses = Counter(status for status, _, _ in answers)
    assert statuses.keys() == {200, 503}
    assert statuses[200] >= 24
    for status, body, retry_after in answers:
        if status == 503:
            assert retry_after >= 1
            assert body["error"]["code"] == "overloaded"
    assert service.caption(PICTURES[0]).status_code == 200


@pytest.mark.parametrize("deployment", ["model-words", "api"])
def test_killed_replica_costs_no_request(
    service: Service, captioner: Captioner, deployment: str
) -> None:
    load = Load(service)

    def kill() -> None:
        load.wait(answers=8)
        killed = service.kill(deployment)
        deadline = time.monotonic() + 180
        while not set(service.replicas(deployment)) - {killed}:
            assert time.monotonic() < deadline
            time.sleep(0.5)
        service.wait_until_ready()
        load.wait(answers=8)

    asyncio.run(load.during(kill))
    assert load.broken == []
    # What was being loaded when its replica died is not given to another one.
    assert load.codes.keys() <= {"replica_lost"}
    assert load.statuses[200] + load.codes["replica_lost"] == load.statuses.total()
    assert load.codes["replica_lost"] <= load.clients
    check_captions(load, {captioner.model.directory.version[:12]: captioner})


def test_new_version_under_load_fails_no_request(
    service: Service, deploy: Callable[[str], int], models: dict[str, str], captioner: Captioner
) -> None:
    new = Captioner.load(models["v2"], device="cpu")
    versions = {one.model.directory.version[:12]: one for one in (captioner, new)}
    load = Load(service)

    def roll_out() -> None:
        deploy(models["v2"])
        wanted = new.model.directory.version[:12]
        deadline = time.monotonic() + 300
        while True:
            load.wait(answers=40)
            seen = {version for _, version, _ in load.answers[-40:]}
            if seen == {wanted}:
                return
            assert time.monotonic() < deadline, seen

    asyncio.run(load.during(roll_out))
    assert load.broken == []
    assert load.statuses.keys() == {200}
    assert {version for _, version, _ in load.answers} == versions.keys()
    check_captions(load, versions)
    cards = httpx.get(f"{service.url}/v1/models").json()["models"]
    assert cards[0]["version"] == new.model.directory.version[:12]


def check_captions(load: Load, versions: dict[str, Captioner]) -> None:
    expected = {
        version: [one.caption([data])[0].text for data in PICTURES]
        for version, one in versions.items()
    }
    wrong = [
        (number, text)
        for number, version, text in load.answers
        if expected[version][number] != text
    ]
    assert wrong == []


def counted(service: Service, metric: str, *tags: str) -> Counter[tuple[str, ...]]:
    """A counter of ours by its tags, over all processes, without the requests for metrics and health themselves."""
    text = httpx.get(f"{service.url}/metrics", timeout=10).text
    found: Counter[tuple[str, ...]] = Counter()
    for labels, value in re.findall(rf"^ray_captioner_{metric}{{(.*)}} (\S+)$", text, re.MULTILINE):
        known = dict(re.findall(r'(\w+)="(.*?)"', labels))
        if known.get("path") not in ("/metrics", "/healthz"):
            found[tuple(known[one] for one in tags)] += int(float(value))
    return +found


def test_metrics_add_up_to_what_clients_saw(service: Service) -> None:
    service.caption(PICTURES[0])  # so that the counters are there
    time.sleep(4)  # and have told all that was before
    tags = ("path", "method", "status")
    before = counted(service, "requests_total", *tags), counted(service, "rejected_total", "code")
    seen: Counter[tuple[str, ...]] = Counter()
    codes: Counter[tuple[str, ...]] = Counter()
    captions, many = "/v1/captions", [("image", ("a.jpg", PICTURES[0]))] * 17
    with httpx.Client(base_url=service.url, timeout=60) as client:
        for method, path, options in (
            ("POST", captions, {"content": PICTURES[0]}),
            ("POST", captions, {"content": b"text"}),
            ("POST", captions, {"content": bomb()}),
            ("POST", captions, {"content": picture(0, "BMP")}),
            ("POST", captions, {"content": bytes(1_000_001)}),
            ("POST", captions, {"files": many}),
            ("POST", f"{captions}?beam_size=32&num_captions=32&max_length=200", {"content": PICTURES[0]}),
            ("POST", f"{captions}?prefix=unheard", {"content": PICTURES[0]}),
            ("GET", captions, {}),
            ("GET", "/nothing", {}),
            ("HEAD", "/", {}),
            ("GET", "/-/routes", {}),
        ):  # fmt: skip
            answer = client.request(method, path, **options)  # type: ignore[arg-type]
            known = path.partition("?")[0] if path != "/nothing" else "other"
            seen[known, method, str(answer.status_code)] += 1
            if answer.status_code >= 400:
                codes[(answer.json()["error"]["code"],)] += 1
            assert answer.headers.get("x-request-id"), (method, path, answer.headers)
    with connect(service) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nX: " + 40_000 * b"a" + b"\r\n\r\n")
        assert b" 431 " in connection.recv(4096)
    seen["other", "other", "431"] += 1
    codes[("headers_too_large",)] += 1
    assert {status for *_, status in seen} == {
        "200",
        "400",
        "404",
        "405",
        "413",
        "415",
        "422",
        "431",
    }
    deadline = time.monotonic() + 60
    while True:  # Ray's processes report from time to time
        requests = counted(service, "requests_total", *tags) - before[0]
        rejected = counted(service, "rejected_total", "code") - before[1]
        if (requests, rejected) == (seen, codes):
            break
        assert time.monotonic() < deadline, (requests, seen, rejected, codes)
        time.sleep(1)
    text = httpx.get(f"{service.url}/metrics", timeout=10).text
    for name in ("request_latency", "load", "queue", "encoder", "decoder"):
        assert f"ray_captioner_{name}_seconds_bucket{{" in text
    assert "ray_captioner_batch_size_bucket{" in text
    assert "ray_captioner_nodes_missing 0\n" in text


def test_shipped_configuration_is_one_ray_and_we_accept() -> None:
    raw = yaml.safe_load((ROOT / "deploy/serve.yaml").read_text())
    found = ServeDeploySchema.model_validate(raw)
    assert found.http_options.host == "127.0.0.1"
    args = ServeConfig.model_validate(found.applications[0].args)
    assert found.http_options.request_timeout_s > args.upload_timeout_s + args.request_timeout_s
