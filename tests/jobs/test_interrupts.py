"""Ctrl-C while Ray Train or Ray Tune, which have handlers of their own, work on a Ray of the job or on a cluster."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.head import ROOT, Head
from tests.said import unexpected
from tests.stores import write_store

JOBS = {
    "train": ["--epochs", "400", "--patience", "None"],
    "tune": ["--space", "notebook", "--max-epochs", "400", "--max-concurrent", "1"],
}


@pytest.mark.long
@pytest.mark.parametrize("job", list(JOBS))
def test_interrupted_job_publishes_nothing_and_says_so(
    job: str, head: Head, tmp_path: Path
) -> None:
    own = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    cluster = head.environment | {"RAY_ADDRESS": head.address}
    features = write_store(tmp_path / "features", {"train": 40, "validation": 5})
    output, log = tmp_path / "out", tmp_path / "log"
    with log.open("w") as file:
        running = subprocess.Popen(
            [sys.executable, "-m", f"ray_jobs.{job}", "--features", features, "--output", str(output), *JOBS[job]],
            cwd=ROOT,
            env=own if job == "train" else cluster,
            stdout=file,
            stderr=subprocess.STDOUT,
            # Children of what a shell started in its background ignore Ctrl-C.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        try:
            deadline = time.monotonic() + 180
            # An epoch is over: Ray Train's and Ray Tune's handlers are in place.
            while not list(output.rglob("checkpoint_*")):
                assert running.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
            running.send_signal(signal.SIGINT)
            status = running.wait(timeout=90)
        finally:
            running.kill()
            running.wait()
    said = log.read_text()
    assert status == 130, said
    assert unexpected(job, said) == []
    assert not (output / "manifest.json").exists()
    assert not (output / "model").exists()
