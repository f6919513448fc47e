"""The commands of the documents run as they are written, on tiny data, and find what they name."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from captioner.sources.scenes import draw_scene
from tests.documents import WRITTEN, job_of
from tests.head import ROOT, Head

pytestmark = pytest.mark.timeout(900)

# Real data and full size, made tiny; what is not named runs as it is written.
TINY = {
    "extract_features": [
        "--source", "shapes", "--source-options.shapes.train", "24", "--source-options.shapes.validation", "6",
        "--source-options.shapes.test", "6", "--encoder.weights", "random", "--encoder.layer", "layer3",
    ],
    "train": ["--decoder.width", "32", "--epochs", "1"],
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
    return root


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
        "runs/flickr8k/features", "runs/flickr8k/model", "runs/flickr8k/report", "runs/my_captions"
    ]  # fmt: skip
