"""How an extraction ends before its time, and what it says: an interrupt, and a Ray that dies under it."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from captioner.artifacts.output import WORK
from captioner.features.row_marks import CHECKPOINT
from tests.head import ROOT, Head
from tests.processes import command_lines, descendants

IMAGES = 4000


def _files(output: Path) -> int:
    marks = output / WORK / CHECKPOINT
    return len([mark for mark in marks.glob("*.parquet") if "pending" not in mark.name])


def _strike(driver: "subprocess.Popen[bytes]", target: str) -> None:
    if target.startswith("SIG"):
        driver.send_signal(signal.Signals[target])
        return
    (victim,) = (
        pid
        for pid in descendants(driver.pid)
        if command_lines([pid]).partition(" ")[0].endswith(f"/{target}")
    )
    os.kill(victim, signal.SIGKILL)


@pytest.mark.long
@pytest.mark.parametrize(
    ("target", "status", "said"),
    [
        ("SIGINT", 130, "interrupted; the same command goes on from here"),
        ("SIGTERM", 143, "interrupted; the same command goes on from here"),
        ("raylet", 75, "error: Ray has died: its raylet on this machine has ended; the same"),
        ("gcs_server", 75, "error: Ray has died: its head at 127.0.0.1:"),
    ],
)
def test_an_extraction_that_ends_early_says_why_and_what_is_kept(
    target: str, status: int, said: str, tmp_path: Path
) -> None:
    output, log = tmp_path / "features", tmp_path / "log"
    options = {"encoder.weights": "random", "source-options.shapes.train": str(IMAGES)}
    command = [
        *(sys.executable, "-m", "ray_jobs.extract_features", "--source", "shapes"),
        *("--output", str(output), *(part for one in options.items() for part in (f"--{one[0]}", one[1]))),
    ]  # fmt: skip
    with log.open("w") as file:
        driver = subprocess.Popen(
            command,
            cwd=ROOT,
            env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
            stdout=file,
            stderr=subprocess.STDOUT,
            # Children of what a shell started in its background ignore Ctrl-C.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    try:
        deadline = time.monotonic() + 180
        while not _files(output):
            assert driver.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        struck = time.monotonic()
        _strike(driver, target)
        assert driver.wait(timeout=60) == status, log.read_text()
        assert time.monotonic() - struck < 60
    finally:
        driver.kill()
        driver.wait()
    text = log.read_text()
    lines = text.splitlines()
    assert [line for line in lines if said in line] == lines[-1:]
    assert "Traceback" not in text
    assert not (output / "manifest.json").exists()
    if target.startswith("SIG"):
        (kept,) = re.findall(r"^([\d,]+) of [\d,]+ images are done and kept$", text, re.MULTILINE)
        assert 0 < int(kept.replace(",", "")) < IMAGES
    assert "state-dump" not in text
    assert "Fatal" not in text


def test_a_cluster_that_asks_for_its_token_is_one_line(head: Head) -> None:
    program = (
        "from captioner.runtime import command_line; from captioner.runtime.cluster import start_ray\n"
        "from captioner.config import DemoConfig; command_line.run(lambda config: start_ray(), DemoConfig)"
    )
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    for token in ({}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "another"}):
        ended = subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env=own | token | {"RAY_ADDRESS": head.address},
            capture_output=True,
            text=True,
            timeout=60,
        )
        (line,) = ended.stderr.splitlines()
        assert "asks for its token: set RAY_AUTH_MODE=token" in line
        assert ended.returncode == 2
