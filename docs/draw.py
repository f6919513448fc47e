"""Draw README's pictures again, after ``make demo``: python docs/draw.py, from the repository's root."""

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
from PIL import Image
from playwright.sync_api import FilePayload, expect, sync_playwright

from captioner.sources.scenes import draw_scene

DOCS, DEMO, PORT = Path("docs"), Path("runs/demo"), 8765
WIDTH = 980


def main() -> None:
    shrink(DEMO / "report/grid.png", DOCS / "demo.png")
    command = [sys.executable, "-m", "ray_jobs.serve", "--model", f"demo={DEMO / 'model'}"]
    with subprocess.Popen([*command, "--port", str(PORT)]) as service:
        try:
            photograph(f"http://127.0.0.1:{PORT}", DOCS / "page.png")
        finally:
            service.send_signal(signal.SIGTERM)
    shrink(DOCS / "page.png", DOCS / "page.png")


def photograph(url: str, place: Path) -> None:
    """The service's page with two scenes that no model has seen."""
    while True:
        time.sleep(1)
        try:
            if httpx.get(f"{url}/healthz").status_code == httpx.codes.OK:
                break
        except httpx.TransportError:
            continue
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        page = browser.new_page(viewport={"width": WIDTH, "height": 760})
        page.goto(url)
        scenes: list[FilePayload] = [
            {
                "name": f"scene {index}.png",
                "mimeType": "image/png",
                "buffer": draw_scene(1, "test", index),
            }
            for index in range(2)
        ]
        page.set_input_files("#files", scenes)
        expect(page.locator(".candidates:visible")).to_have_count(len(scenes), timeout=60_000)
        page.screenshot(path=place)


def shrink(source: Path, place: Path) -> None:
    with Image.open(source) as picture:
        small = picture.convert("RGB")
    small.thumbnail((WIDTH, 10 * WIDTH), Image.Resampling.LANCZOS)
    small.save(place, optimize=True)


if __name__ == "__main__":
    main()
