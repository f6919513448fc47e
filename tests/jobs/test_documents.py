"""The commands of the documents run as they are written, on tiny data, and find what they name."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from captioner.sources.scenes import draw_scene
from tests.documents import WRITTEN, block_with, job_of
from tests.head import ROOT, Head, free_port
from tests.processes import descendants

pytestmark = pytest.mark.timeout(900)

# Real data and full size, made tiny; what is not named runs as it is written.
TINY = {
    "extract_features": ["--source", "hub", "--encoder.weights", "random", "--encoder.layer", "layer3"],
    "train": ["--decoder.width", "32", "--epochs", "1"],
    "finetune": ["--source", "hub", "--epochs", "1"],
}  # fmt: skip


@pytest.mark.usefixtures("head")
def test_files_that_the_documents_name_below_a_session_are_written_by_every_head() -> None:
    session = Path(os.environ["RAY_TMPDIR"]) / "ray/session_latest"
    named = [
        path
        for _, command in WRITTEN
        for path in re.findall(r"/tmp/ray/session_latest/(\S+)", command)
    ]
    assert len(named) >= 2
    assert [path for path in named if not (session / path).is_file()] == []


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that looks like the repository's root to the jobs, with a folder of pictures."""
    root = tmp_path_factory.mktemp("sandbox")
    for package in ("captioner", "ray_jobs"):
        shutil.copytree(ROOT / package, root / package)
    (root / "my_photos").mkdir()
    for index in range(3):
        (root / "my_photos" / f"{index}.png").write_bytes(draw_scene(0, "test", index))
    write_hub(root / "hub")
    return root


def write_hub(folder: Path) -> None:
    """Generated scenes as the hub has Flickr8k: Parquet files, a split each."""
    folder.mkdir()
    for split, count in (("train", 24), ("validation", 6), ("test", 6)):
        rows = [
            {
                "image": {"bytes": draw_scene(0, "train", index), "path": f"{index}.png"},
                **{f"caption_{number}": f"A scene number {number} ." for number in range(5)},
            }
            for index in range(count)
        ]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}-00000-of-00001.parquet")


@pytest.mark.long
def test_flickr8k_gets_from_nothing_to_a_page_in_one_copied_block(
    head: Head, sandbox: Path
) -> None:
    port, log = free_port(), sandbox / "log"
    tiny = "".join(f'{name}) set -- "$@" {shlex.join(more)};; ' for name, more in TINY.items())
    script = f"""set -e
make() {{ [ "$*" = install ]; }}
source() {{ [ "$*" = .venv/bin/activate ]; }}
captioner() {{
    case "$1" in {tiny} serve) set -- "$@" --port {port}; unset RAY_ADDRESS;; esac
    '{sys.executable}' -m ray_jobs "$@"
}}
{block_with("README.md", "--source flickr8k")}"""
    with log.open("w") as output:
        running = subprocess.Popen(
            ["bash", "-c", script],
            cwd=sandbox,
            env=head.environment | {"RAY_ADDRESS": head.address},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = time.monotonic() + 600
        while "\nserving model at " not in log.read_text():
            assert running.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
        url = f"http://127.0.0.1:{port}"
        assert "captioner" in httpx.get(url).text
        answer = httpx.post(f"{url}/v1/captions", content=draw_scene(0, "test", 1), timeout=60)
        assert answer.json()["captions"][0]["caption"]
    finally:
        (service,) = descendants(running.pid)[1:2] or [running.pid]
        os.kill(service, signal.SIGTERM)
        running.wait(timeout=60)
    said = log.read_text().splitlines()
    followed = [
        line.removeprefix("next: captioner ")
        for line in said
        if line.startswith("next: captioner ")
    ]
    # Each job names the next one of the block.
    assert [line.split()[0] for line in followed] == ["train", "evaluate", "serve"]


@pytest.mark.long
def test_jobs_of_the_documents_run_as_written_one_after_the_other(
    head: Head, sandbox: Path
) -> None:
    ran = []
    for document, command in WRITTEN:
        words = shlex.split(command)
        # Those of the benchmarks take hours.
        if document.startswith("benchmarks/") or words[0] != "python" or words[2] == "pytest":
            continue
        name, arguments = job_of(words)
        # They stay or take minutes, and have tests of their own.
        if name in ("serve", "tune", "benchmark extract", "benchmark train", "benchmark serve"):
            continue
        done = subprocess.run(
            [sys.executable, *words[1:], *TINY.get(name, [])],
            cwd=sandbox,
            env=head.environment | {"RAY_ADDRESS": head.address},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        ran.append(name)
    assert set(ran) >= {"extract_features", "train", "evaluate", "caption"}
    published = sorted(
        str(file.parent.relative_to(sandbox)) for file in sandbox.rglob("manifest.json")
    )
    assert published == [
        "runs/flickr8k/features", "runs/flickr8k/finetuned", "runs/flickr8k/model", "runs/flickr8k/report",
        "runs/my_captions",
    ]  # fmt: skip
