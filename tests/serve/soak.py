"""A service's life at its worst: ``python -m tests.serve.soak --pictures my_photos/ --model runs/flickr8k/model``.

Clients of a fast model and of a slow one send good, bad, huge, truncated, poisonous and slowly dripping requests, to
the slow one as many as it can serve and then sixteen times that, while a replica or a proxy is killed every minute. The
exit status is 1 when a good picture gets a wrong caption, when anything gets an answer that it should not (of 5xx only
503 with Retry-After), when Serve itself replaces a replica, when the flood costs more than a tenth of the slow model's
throughput, or when a process keeps growing. ``--csv`` appends the figures to a file.
"""

import argparse
import asyncio
import io
import os
import random
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from PIL import Image

from benchmarks.measurement import append_rows
from captioner.captioning.captioner import Captioner
from captioner.config import DecodeConfig
from tests.head import ROOT, free_port
from tests.models import write_model
from tests.pictures import bomb, picture
from tests.serve.service import Service

ROLES = (
    "ProxyActor",
    "ServeController",
    "ServeReplica:captioner:api",
    "ServeReplica:captioner:model",
)
GROWTH = 1.15  # of the median memory of a role, from the first to the last third
GOODPUT = 0.9  # of the slow model under a flood, of what it is when it is just saturated
PROXY = "proxy"
PROXY_BACK_S = 30.0  # a killed one takes, and its clients' connections with it
SLACK_BYTES = 40 * 2**20
DECODES = {
    "": DecodeConfig(),
    "?beam_size=1": DecodeConfig(beam_size=1),
    "?beam_size=4&max_length=12": DecodeConfig(beam_size=4, max_length=12),
}


@dataclass
class Report:
    """What happened."""

    answers: Counter[str] = field(default_factory=Counter)
    """By kind of request and status."""
    wrong: list[str] = field(default_factory=list)
    kills: list[str] = field(default_factory=list)
    memory: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    """Bytes of all processes of a role that are not shared, by time."""
    replaced: list[str] = field(default_factory=list)
    """Replicas that ended and that nobody here had killed."""
    goodput: dict[str, float] = field(default_factory=dict)
    """Answers a second of the slow model, saturated and flooded."""

    def problems(self) -> list[str]:
        found = self.wrong + [f"Serve replaced {one}" for one in self.replaced]
        if self.goodput and self.goodput["flooded"] < GOODPUT * self.goodput["saturated"]:
            found.append(f"the flood cost throughput: {self.goodput}")
        for role, sizes in self.memory.items():
            third = max(1, len(sizes) // 3)
            first, last = statistics.median(sizes[:third]), statistics.median(sizes[-third:])
            if last > GROWTH * first + SLACK_BYTES:
                found.append(f"{role} grew from {first / 2**20:.0f} to {last / 2**20:.0f} MiB")
        return found

    def row(self, options: argparse.Namespace) -> dict[str, str | int | float]:
        """For CSV."""
        outcomes: Counter[str] = Counter()
        for kind, number in self.answers.items():
            last = kind.split()[-1]
            outcomes[last if last.isdigit() else "lost with a killed proxy or cut off"] += number
        found: dict[str, str | int | float] = {
            "minutes": options.minutes,
            "answered": outcomes["200"],
            "refused_503": outcomes["503"],
            "other_statuses": sum(n for kind, n in outcomes.items() if kind not in ("200", "503")),
            "wrong": len(self.wrong),
            "kills": len(self.kills),
            "replaced_by_serve": len(self.replaced),
            **{f"goodput_{name}": round(rate, 3) for name, rate in self.goodput.items()},
        }
        for role, sizes in self.memory.items():
            name = role.rpartition(":")[2].lower()
            found[f"{name}_mib"], found[f"{name}_last_mib"] = (
                round(statistics.median(third) / 2**20)
                for third in (sizes[: max(1, len(sizes) // 3)], sizes[-max(1, len(sizes) // 3) :])
            )
        return found

    def table(self) -> str:
        lines = [f"{number:8,}  {kind}" for kind, number in sorted(self.answers.items())]
        lines.append(f"{len(self.kills)} kills: {', '.join(self.kills)}")
        lines += [
            f"{rate:.2f} answers/s of the slow model, {name}" for name, rate in self.goodput.items()
        ]
        for role, sizes in self.memory.items():
            third = max(1, len(sizes) // 3)
            thirds = [sizes[:third], sizes[third:-third] or sizes, sizes[-third:]]
            text = ", ".join(f"{statistics.median(one) / 2**20:.0f}" for one in thirds)
            lines.append(f"{role}: {text} MiB (medians of three thirds of the time)")
        return "\n".join([*lines, *(f"FAILED: {one}" for one in self.problems())])


def expected_captions(captioner: Captioner, pictures: list[bytes]) -> dict[tuple[int, str], str]:
    """By picture and query."""
    return {
        (number, query): caption.text
        for query, decode in DECODES.items()
        for number, caption in enumerate(captioner.caption(pictures, decode))
    }


async def soak(
    service: Service,
    pictures: list[bytes],
    expected: dict[tuple[int, str], str],
    *,
    deployments: list[str],
    seconds: float,
    kill_every: float,
    upload_timeout_s: float,
    huge_bytes: int,
    clients: int = 4,
    saturating: int = 0,
) -> Report:
    """Run all kinds of clients for a time.

    Args:
        deployments: of which replicas are killed in turn.
        huge_bytes: above the service's limit of an image, below that of a request.
        saturating: clients that a model called ``slow`` can just serve; for the second half sixteen times as many.
    """
    report = Report()
    proxy_back = [0.0]
    killed: set[int] = set()
    end = time.monotonic() + seconds
    large = [data for data in pictures if len(data) > 2000] or pictures
    hopeless = {
        "bad": (400, b"this is no picture"),
        "type": (415, picture(0, "BMP")),
        "bomb": (413, bomb()),
        "poison": (413, _poison()),
        "huge": (413, pictures[0] + bytes(huge_bytes)),
        "truncated": (400, large[0][: len(large[0]) // 2]),
    }

    def note(kind: str, status: int, wanted: int, body: Any, retry_after: str | None) -> None:
        report.answers[f"{kind} {status}"] += 1
        if status == 503 and retry_after is not None:
            return
        if status != wanted:
            report.wrong.append(f"{kind}: {status} {str(body)[:200]}")

    async def post(session: aiohttp.ClientSession, query: str, data: bytes) -> Any:
        async with session.post(f"{service.url}/v1/captions{query}", data=data) as answer:
            return answer.status, await answer.json(), answer.headers.get("Retry-After")

    async def send(session: aiohttp.ClientSession, kind: str, query: str, data: bytes, wanted: int) -> Any:  # fmt: skip
        try:
            status, body, retry_after = await post(session, query, data)
        except (aiohttp.ClientError, ValueError) as error:
            if time.monotonic() < proxy_back[0]:
                report.answers[f"{kind} lost with its proxy"] += 1
                await asyncio.sleep(1)
            else:
                report.wrong.append(f"{kind}: {error!r}")
            return None
        note(kind, status, wanted, body, retry_after)
        if status == 503:
            await asyncio.sleep(float(retry_after or 1))
        return body if status == 200 else None

    async def good(session: aiohttp.ClientSession, generator: random.Random, kind: str) -> None:
        number, query = generator.randrange(len(pictures)), generator.choice(list(DECODES))
        body = await send(session, kind, query, pictures[number], 200)
        if body is not None and body["captions"][0]["caption"] != expected[number, query]:
            report.wrong.append(f"wrong caption of picture {number}: {body['captions'][0]}")

    async def steady(seed: int) -> None:
        generator = random.Random(seed)
        async with aiohttp.ClientSession() as session:
            while time.monotonic() < end:
                await good(session, generator, "good")

    async def hostile() -> None:
        generator = random.Random(1)
        async with aiohttp.ClientSession() as session:
            while time.monotonic() < end:
                kind = generator.choice(list(hopeless))
                wanted, data = hopeless[kind]
                await send(session, kind, "", data, wanted)
                await asyncio.sleep(0.2)

    async def burst() -> None:
        generator = random.Random(2)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            while time.monotonic() < end:
                await asyncio.sleep(min(20.0, seconds / 3))
                await asyncio.gather(*(good(session, generator, "burst") for _ in range(300)))

    async def slow() -> None:
        address = urlsplit(service.url)
        starts = (
            b"POST /v1/captions HTTP/1.1\r\nHost: x\r\nX-Slow: ",
            b"POST /v1/captions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n",
        )
        for start in 1000 * starts:
            if time.monotonic() > end:
                return
            began = time.monotonic()
            reader, writer = await asyncio.open_connection(address.hostname, address.port)
            outcome = "cut off"
            try:
                writer.write(start)
                while not reader.at_eof() and time.monotonic() < began + 3 * upload_timeout_s:
                    writer.write(b"x")
                    await writer.drain()
                    try:
                        data = await asyncio.wait_for(reader.read(4096), 0.5)
                    except TimeoutError:
                        continue
                    if found := re.match(rb"HTTP/1.1 (\d+)", data):
                        outcome = found[1].decode()
                else:
                    if not reader.at_eof():
                        report.wrong.append("a slow client was kept")
            except OSError:
                pass
            finally:
                writer.close()
            report.answers[f"slow {outcome}"] += 1
            if outcome not in ("cut off", "408", "503"):
                report.wrong.append(f"slow: {outcome}")

    async def killer() -> None:
        turn = 0
        while time.monotonic() + kill_every / 2 < end:
            await asyncio.sleep(kill_every)
            if time.monotonic() > end:
                return
            deployment = deployments[turn % len(deployments)]
            turn += 1
            pids = service.proxies if deployment == PROXY else partial(service.replicas, deployment)
            if found := await asyncio.to_thread(pids):
                if deployment == PROXY:
                    proxy_back[0] = time.monotonic() + PROXY_BACK_S
                killed.add(found[0])
                os.kill(found[0], signal.SIGKILL)
                report.kills.append(deployment)

    async def saturate() -> None:
        half = time.monotonic() + seconds / 2
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as session:
            for name, number, until in (
                ("saturated", saturating, half),
                ("flooded", 16 * saturating, end),
            ):
                began, answered = time.monotonic(), 0

                async def client(seed: int, until: float = until, name: str = name) -> None:
                    nonlocal answered
                    generator = random.Random(seed)
                    while time.monotonic() < until:
                        picture = generator.randrange(len(pictures))
                        body = await send(session, name, "?model=slow", pictures[picture], 200)
                        if body is not None:
                            answered += time.monotonic() < until
                            if body["captions"][0]["caption"] != expected[picture, ""]:
                                report.wrong.append(f"slow: wrong caption of picture {picture}")

                await asyncio.gather(*(client(seed) for seed in range(number)))
                report.goodput[name] = answered / (until - began)

    async def watch_replicas() -> None:
        known: dict[int, str] = {}
        while time.monotonic() < end:
            now = dict(await asyncio.to_thread(service.processes))
            for pid, name in known.items():
                if pid not in now and pid not in killed:
                    report.replaced.append(name)
            pattern = r"ray::ServeReplica:captioner:[\w-]+"
            found = {pid: re.match(pattern, command) for pid, command in now.items()}
            known = {pid: one[0] for pid, one in found.items() if one}
            await asyncio.sleep(2)

    async def watch() -> None:
        while time.monotonic() < end:
            for role, size in (await asyncio.to_thread(_memory, service)).items():
                report.memory[role].append(size)
            await asyncio.sleep(5)

    tasks = [steady(10 + one) for one in range(clients)]
    tasks += [saturate()] if saturating else []
    tasks += [hostile(), burst(), slow(), slow(), killer(), watch(), watch_replicas()]
    await asyncio.gather(*tasks)
    return report


def _memory(service: Service) -> dict[str, int]:
    found: dict[str, int] = defaultdict(int)
    for pid, command in service.processes():
        for role in ROLES:
            if command.startswith(f"ray::{role}"):
                try:
                    _, resident, shared, *_ = Path(f"/proc/{pid}/statm").read_text().split()
                except (FileNotFoundError, ProcessLookupError):
                    continue
                found[role] += (int(resident) - int(shared)) * 4096
    return found


def _poison() -> bytes:
    """Two KiB of WebP whose loading takes a GiB."""
    file = io.BytesIO()
    Image.new("RGBA", (8000, 8000)).save(file, "WEBP", lossless=True)
    return file.getvalue()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", help="model directory; default: a tiny one with untrained weights"
    )
    parser.add_argument("--pictures", type=Path, help="folder of good JPEG files; default: made up")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--kill-every", type=float, default=60.0, help="seconds")
    parser.add_argument("--slow-seconds", type=float, default=0.2, help="more for each picture")
    parser.add_argument("--saturating", type=int, default=6, help="clients of the slow model")
    parser.add_argument("--csv", help="file to append the figures to")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or write_model(Path(folder) / "model")
        pictures = [picture(number, size=(320, 240)) for number in range(24)]
        if options.pictures:
            files = sorted(options.pictures.glob("*.jpg"))[:40]
            pictures = [file.read_bytes() for file in files]
        expected = expected_captions(Captioner.load(model, device="cpu"), pictures)
        report = run_service(options, model, pictures, expected)
    print(report.table())
    if options.csv:
        append_rows(
            options.csv,
            [report.row(options)],
            shlex.join(["python", "-m", "tests.serve.soak", *sys.argv[1:]]),
        )
    return int(bool(report.problems()))


def run_service(
    options: argparse.Namespace,
    model: str,
    pictures: list[bytes],
    expected: dict[tuple[int, str], str],
) -> Report:
    """The soak of a service that is started for it."""
    port = free_port()
    command = [sys.executable, "-m", "tests.serve.slow", "--port", str(port)]
    command += ["--model", f"fast={model}", "--model", f"slow={model}", "--threads", "1"]
    command += ["--upload-timeout-s", "5", "--request-timeout-s", "10", "--max-queued", "64"]
    environment = os.environ | {"SLOW_SECONDS": str(options.slow_seconds)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    try:
        service = Service(f"http://127.0.0.1:{port}", process.pid)
        service.wait_until_ready(process)  # type: ignore[arg-type]
        return asyncio.run(
            soak(
                service, pictures, expected, deployments=["model-fast", PROXY, "api"],
                seconds=60 * options.minutes, kill_every=options.kill_every, upload_timeout_s=5,
                huge_bytes=17 * 2**20, saturating=options.saturating,
            )
        )  # fmt: skip
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=120)


if __name__ == "__main__":
    sys.exit(main())
