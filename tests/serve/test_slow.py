"""A service whose model is slow, under more load than it can carry, and at its end."""

import asyncio
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import aiohttp
import httpx
import pytest

from tests.head import ROOT, free_port
from tests.pictures import picture
from tests.serve.service import Service

pytestmark = pytest.mark.timeout(900)

SECONDS = 0.2
"""For a picture, so that five are captioned in a second."""


async def flood(url: str, clients: int, seconds: float) -> tuple[Counter[str], list[float]]:
    """Outcomes of clients that come back as they are told to, and how long /healthz took meanwhile."""
    outcomes: Counter[str] = Counter()
    health: list[float] = []
    end = time.monotonic() + seconds
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:

        async def client(number: int) -> None:
            while time.monotonic() < end:
                async with session.post(f"{url}/v1/captions", data=picture(number)) as answer:
                    await answer.read()
                outcomes[str(answer.status)] += time.monotonic() < end
                if answer.status == 503:
                    await asyncio.sleep(float(answer.headers["Retry-After"]))

        async def ask_health() -> None:
            while time.monotonic() < end:
                began = time.monotonic()
                for path in ("/healthz", "/-/healthz"):
                    async with session.get(f"{url}{path}") as answer:
                        outcomes[f"{path} {answer.status}"] += 1
                health.append(time.monotonic() - began)
                await asyncio.sleep(0.3)

        await asyncio.gather(ask_health(), *(client(number) for number in range(clients)))
    return outcomes, health


def test_overload_costs_no_throughput_and_sigterm_no_request(
    models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLOW_SECONDS", str(SECONDS))
    port, log = free_port(), tmp_path / "log"
    command = [sys.executable, "-m", "tests.serve.slow", "--port", str(port)]
    command += ["--model", f"slow={models['v1']}"]
    # As many clients as are served in time fill a queue of so many seconds.
    command += ["--request-timeout-s", "4", "--threads", "1"]
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
    service = Service(f"http://127.0.0.1:{port}", process.pid)
    try:
        service.wait_until_ready(process)
        [replica] = service.replicas("model-slow")
        few, _ = asyncio.run(flood(service.url, 6, 12))
        many, health = asyncio.run(flood(service.url, 96, 20))
        assert few["200"] >= 0.7 * 12 / SECONDS, few
        assert many["200"] / 20 >= 0.85 * few["200"] / 12, (few, many)
        assert {kind for kind in many if not kind.startswith("/")} == {"200", "503"}
        assert {kind for kind in many if kind.startswith("/")} == {"/healthz 200", "/-/healthz 200"}
        assert max(health) < 4
        assert service.replicas("model-slow") == [replica]

        address = f"{service.url}/v1/captions"
        with ThreadPoolExecutor(6) as pool:
            under_way = [
                pool.submit(httpx.post, address, content=picture(number), timeout=60)
                for number in range(6)
            ]
            time.sleep(0.6)
            process.send_signal(signal.SIGTERM)
            time.sleep(0.6)
            try:
                assert service.caption(picture(0)).status_code == 503
            except httpx.TransportError:
                pass
            assert [one.result().status_code for one in under_way] == [200] * 6
        assert process.wait(timeout=40) == 0
    finally:
        process.kill()
        text = log.read_text()
        print(text)  # shown where the test fails
    assert "Traceback" not in text
    assert "error: " not in text  # of ours; Ray notes what it killed
