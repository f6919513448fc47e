"""``python -m ray_jobs.serve`` as a person starts it: its own Ray, tokens from a file, a clean end."""

import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import expect, sync_playwright

from captioner.captioning.captioner import Captioner
from captioner.config import DecodeConfig
from tests.head import ROOT, free_port
from tests.pictures import picture
from tests.said import unexpected
from tests.serve.service import Service
from tests.transformers_models import write_blip

pytestmark = pytest.mark.timeout(900)


def test_service_starts_asks_for_its_token_and_stops(
    models: dict[str, str], tmp_path: Path
) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("secret\n")
    name = "modèle ü #1?%20'\""
    model = shutil.copytree(models["v1"], tmp_path / "odd dir" / name)
    blip = write_blip(tmp_path / "blip")
    port = free_port()
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "ray_jobs.serve", "--model", str(model), "--port", str(port),
             "--token-file", str(tokens), "--model", blip],
            cwd=ROOT, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
    service = Service(f"http://127.0.0.1:{port}", process.pid)
    try:
        service.wait_until_ready(process)
        assert service.caption(picture(0)).status_code == 401
        # Ray Serve's proxy answers this one itself.
        assert httpx.get(f"{service.url}/-/routes").status_code == 401
        headers = {"authorization": "Bearer secret"}
        models_found = httpx.get(f"{service.url}/v1/models", headers=headers).json()["models"]
        assert [one["name"] for one in models_found] == [name, "blip"]
        assert models_found[1]["decoder"] == "blip"
        good = httpx.post(
            f"{service.url}/v1/captions",
            params={"model": name},
            content=picture(0),
            headers=headers,
            timeout=30,
        )
        assert (good.status_code, good.json()["model"]) == (200, name)
        asked = {"num_captions": 2, "prefix": "a photo of", "max_length": 9, "attention": True}
        other, refused = (
            httpx.post(
                f"{service.url}/v1/captions",
                params={"model": "blip"} | search,
                content=picture(0),
                headers=headers,
                timeout=30,
            )
            for search in (asked, {"mbr_samples": 5})
        )
        (found,) = other.json()["captions"]
        decode = DecodeConfig(beam_size=2, num_captions=2, prefix="a photo of", max_length=9)
        (expected,) = Captioner.load(blip, "cpu").caption([picture(0)], decode)
        texts = [found["caption"], *(one["caption"] for one in found["alternatives"])]
        assert texts == [one.text for one in expected.candidates]
        assert found["attention"] is None
        assert refused.status_code == 422
        assert "mbr_samples" in refused.json()["error"]["message"]
        assert models_of_page(service.url) in ([name, "blip"], None)
        assert listening(process.pid, port) == {"127.0.0.1"}
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        text = log.read_text()
        print(text)  # shown where the test fails
    assert unexpected("serve", text) == []
    assert f"serving {name}, blip at http://127.0.0.1:{port}" in text
    with pytest.raises(httpx.ConnectError):
        httpx.get(service.url)


def models_of_page(url: str) -> list[str] | None:
    """What the page's menu offers to somebody with a token; None where there is no Chromium."""
    path = shutil.which("chromium")
    if path is None:
        return None
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = browser.new_page(http_credentials={"username": "me", "password": "secret"})
        page.goto(url)
        option = page.locator("#model option")
        expect(option).to_have_count(2, timeout=30_000)
        return option.all_inner_texts()


def listening(pid: int, port: int) -> set[str]:
    """Addresses on which something listens at a port."""
    rows = Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]
    found = set()
    for row in rows:
        local, state = row.split()[1], row.split()[3]
        address, _, number = local.partition(":")
        if state == "0A" and int(number, 16) == port:
            found.add(socket.inet_ntoa(bytes.fromhex(address)[::-1]))
    return found
