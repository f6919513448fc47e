"""Models on the hub: pushed by the job, read by their name; the hub is a server on loopback."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.hub import TOKEN, Hub, serve_hub
from tests.models import write_model

ROOT = Path(__file__).resolve().parents[2]
LOAD = """
import sys
from captioner.artifacts.model_directory import load_model
from captioner.runtime.command_line import fail
from captioner.errors import CaptionerError
try:
    directory = load_model(sys.argv[1]).directory
    directory.read("encoder.safetensors")
    print(directory.uri, directory.version, flush=True)
except CaptionerError as error:
    fail(str(error), error.status)
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve_hub() as found:
        yield found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("model") / "model", "adaptive_attention")


def environment(hub: Hub, home: Path) -> dict[str, str]:
    return os.environ | hub.environment | {"HF_HOME": str(home)}


def push(model: str, hub: Hub, home: Path, *more: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "ray_jobs.push", "--model", model, "--repo", "org/name", *more]
    return subprocess.run(
        command, cwd=ROOT, env=environment(hub, home), capture_output=True, text=True
    )


def load(name: str, hub: Hub, home: Path, **more: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", LOAD, name]
    return subprocess.run(
        command, cwd=ROOT, env=environment(hub, home) | more, capture_output=True, text=True
    )


def test_a_pushed_model_is_read_by_its_name(model: str, hub: Hub, tmp_path: Path) -> None:
    done = push(model, hub, tmp_path, "--license", "mit", "--dataset", "org/pictures")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "hf:org/name\n"
    (line,) = done.stderr.splitlines()
    assert re.fullmatch(r"next: \S*captioner serve --model hf:org/name", line)
    commit, files = hub.files("org/name")
    there = {str(file.relative_to(model)) for file in Path(model).rglob("*") if file.is_file()}
    there = {path for path in there if not path.startswith("_work/")}
    assert files.keys() == there - {"_job.json"} | {"README.md"}
    card = files["README.md"].decode()
    _, head, text = card.split("---\n", 2)
    metadata = yaml.safe_load(head)
    assert metadata["license"] == "mit"
    assert metadata["datasets"] == "org/pictures"
    assert "adaptive_attention" in text
    assert "captioner serve --model hf:org/name" in text
    assert str(ROOT.parent) not in card
    assert model not in card
    assert TOKEN not in done.stdout + done.stderr

    # A later push does not change what the commit names, and what is in the cache needs no hub.
    first = load("hf:org/name", hub, tmp_path)
    assert first.stdout.startswith(f"hf:org/name@{commit} "), first.stderr
    again = push(model, hub, tmp_path, "--license", "apache-2.0")
    assert again.returncode == 0, again.stderr
    assert hub.files("org/name")[0] != commit
    hub.failing = True
    offline = load(f"hf:org/name@{commit}", hub, tmp_path, HF_HUB_OFFLINE="1")
    assert offline.stdout == first.stdout


def test_an_interrupted_push_goes_on_where_it_was(model: str, hub: Hub, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ray_jobs.push", "--model", model, "--repo", "org/name"]
    running = subprocess.Popen(
        command, cwd=ROOT, env=environment(hub, tmp_path), stderr=subprocess.DEVNULL
    )
    while not hub.uploads:
        assert running.poll() is None
        time.sleep(0.001)
    running.send_signal(signal.SIGKILL)
    running.wait()
    # Perhaps all was there already: then the test says less, but what it says holds.
    committed = bool(hub.commits["org/name"])
    before = len(hub.uploads)
    done = push(model, hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(hub.uploads) == len(set(hub.uploads))
    assert committed or before < len(hub.uploads)
    assert load("hf:org/name", hub, tmp_path).returncode == 0


@pytest.mark.parametrize(
    ("name", "message", "status"),
    [
        ("hf:org/absent", "there is no such repository or revision", 2),
        ("hf:org/name@v2", "there is no such repository or revision", 2),
        ("hf:a/b/c", "Repo id must be", 2),
        ("hf:", "Repo id must", 2),
        ("hf:org/other", "is no model of this package", 2),
        ("hf:org/odd", "is damaged: files", 2),
    ],
)
def test_a_name_that_is_no_model_is_one_line(
    hub: Hub, tmp_path: Path, name: str, message: str, status: int
) -> None:
    hub.commits = {"org/name": {}, "org/other": {}, "org/odd": {}}
    hub.commit("org/name", {"manifest.json": b"{}"})
    hub.commit("org/other", {"model.safetensors": b""})
    hub.commit("org/odd", {"manifest.json": b'{"kind": "model", "schema_version": 2}'})
    done = load(name, hub, tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (status, 1), done.stderr
    assert message in done.stderr


def test_a_hub_out_of_reach_is_one_line_and_status_75(model: str, hub: Hub, tmp_path: Path) -> None:
    hub.failing = True
    for name in ("hf:org/other", model):
        done = push(name, hub, tmp_path)
        assert (done.returncode, done.stderr.count("\n")) == (75, 1), done.stderr


def test_a_push_without_a_valid_token_is_one_line(model: str, hub: Hub, tmp_path: Path) -> None:
    environ = environment(hub, tmp_path) | {"HF_TOKEN": "hf_wrong"}
    command = [sys.executable, "-m", "ray_jobs.push", "--model", model, "--repo", "org/name"]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "hf_wrong" not in done.stderr + done.stdout
    assert re.search("401|Unauthorized|Invalid", done.stderr)
