"""Ten minutes of a service's life: ``python -m tests.serve.soak --model runs/flickr8k/model --pictures my_photos/``.

Clients send good, bad, huge, truncated and slowly dripping requests, now and then too many at once, while a replica is
killed every minute. The exit status is 1 when a good picture gets a wrong caption, when anything gets an answer that
it should not (of 5xx only the 503 of a full queue, with Retry-After), or when a process keeps growing.
"""

import argparse
import asyncio
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from captioner.captioning.captioner import Captioner
from captioner.config import DecodeConfig
from tests.head import ROOT, free_port
from tests.pictures import bomb, picture
from tests.serve.service import Service

ROLES = (
    "ProxyActor",
    "ServeController",
    "ServeReplica:captioner:api",
    "ServeReplica:captioner:model",
)
GROWTH = 1.15  # of the median memory of a role, from the first to the last third
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

    def problems(self) -> list[str]:
        found = list(self.wrong)
        for role, sizes in self.memory.items():
            third = max(1, len(sizes) // 3)
            first, last = statistics.median(sizes[:third]), statistics.median(sizes[-third:])
            if last > GROWTH * first + SLACK_BYTES:
                found.append(f"{role} grew from {first / 2**20:.0f} to {last / 2**20:.0f} MiB")
        return found

    def table(self) -> str:
        lines = [f"{number:8,}  {kind}" for kind, number in sorted(self.answers.items())]
        lines.append(f"{len(self.kills)} kills: {', '.join(self.kills)}")
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
) -> Report:
    """Run all kinds of clients for a time.

    Args:
        deployments: of which replicas are killed in turn.
        huge_bytes: above the service's limit of an image, below that of a request.
    """
    report = Report()
    end = time.monotonic() + seconds
    large = [data for data in pictures if len(data) > 2000] or pictures
    hopeless = {
        "bad": (400, b"this is no picture"),
        "type": (415, picture(0, "BMP")),
        "bomb": (413, bomb()),
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
            if await asyncio.to_thread(service.replicas, deployment):
                await asyncio.to_thread(service.kill, deployment)
                report.kills.append(deployment)

    async def watch() -> None:
        while time.monotonic() < end:
            for role, size in (await asyncio.to_thread(_memory, service)).items():
                report.memory[role].append(size)
            await asyncio.sleep(5)

    tasks = [steady(10 + one) for one in range(clients)]
    await asyncio.gather(*tasks, hostile(), burst(), slow(), slow(), killer(), watch())
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="model directory")
    parser.add_argument("--pictures", type=Path, required=True, help="folder of good JPEG files")
    parser.add_argument("--minutes", type=float, default=10.0)
    options = parser.parse_args()
    pictures = [file.read_bytes() for file in sorted(options.pictures.glob("*.jpg"))[:40]]
    expected = expected_captions(Captioner.load(options.model), pictures)
    port = free_port()
    command = [sys.executable, "-m", "ray_jobs.serve", "--model", f"model={options.model}"]
    command += ["--port", str(port), "--upload-timeout-s", "5", "--max-queued", "64"]
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        service = Service(f"http://127.0.0.1:{port}", process.pid)
        service.wait_until_ready(process)  # type: ignore[arg-type]
        report = asyncio.run(
            soak(
                service, pictures, expected, deployments=["model-model", "api"],
                seconds=60 * options.minutes, kill_every=60, upload_timeout_s=5,
                huge_bytes=17 * 2**20,
            )
        )  # fmt: skip
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=120)
    print(report.table())
    return int(bool(report.problems()))


if __name__ == "__main__":
    sys.exit(main())
