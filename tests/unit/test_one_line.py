"""Where the world is not as it should be, a job says so in one line and publishes nothing."""

import contextlib
import importlib
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray

from captioner import storage
from tests.models import write_model
from tests.pictures import picture
from tests.s3 import Fault, S3Server
from tests.stores import write_store

ROOT = Path(__file__).resolve().parents[2]
WRONG, AWAY = 2, 75

DENIED = Fault(403, "AccessDenied")
EXPIRED = Fault(400, "ExpiredToken")
BROKEN, BUSY, MANY = (
    Fault(500, "InternalError"),
    Fault(503, "SlowDown"),
    Fault(429, "TooManyRequests"),
)
PAGE = Fault(200, "OK", body="<html><title>Welcome</title></html>")

SOURCE = [
    "extract_features",
    "--encoder.weights=random",
    "--retry-seconds=1",
    "--source={bucket}/photos",
]
FEATURES = ["train", "--features={bucket}/features"]
SPACE = ["tune", "--features={bucket}/features"]
MODEL = ["caption", "--retry-seconds=1", "--images={world}/photos", "--model={bucket}/model"]
SCORED = ["evaluate", "--features={world}/features", "--model={bucket}/model"]
OUTPUT = ["train", "--features={world}/features", "--output={bucket}/out"]
VERIFY = ["verify", "{bucket}/features"]

STORE = ["train", "--features={world}/features"]
CAPTIONER = ["caption", "--retry-seconds=1", "--images={world}/photos", "--model={world}/model"]


def empty(file: Path) -> None:
    """What a power cut leaves of a file that was not on the disk yet."""
    file.write_bytes(b"")


def halve(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file: Path) -> None:
    """A bit of the first page, behind its header."""
    data = bytearray(file.read_bytes())
    data[60] ^= 1
    file.write_bytes(data)


def remove(file: Path) -> None:
    file.unlink()


class Text:
    def __init__(self, text: str):
        self.text = text

    def __call__(self, file: Path) -> None:
        file.write_text(self.text)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, bucket: str) -> Path:
    """Pictures, a feature store and a model, here and in the bucket."""
    root = tmp_path_factory.mktemp("published")
    write_store(root / "features", {"train": 4, "validation": 4})
    write_model(root / "model")
    (root / "photos").mkdir()
    (root / "photos" / "a.png").write_bytes(picture(0))
    for file in storage.list_files(str(root)):
        storage.copy_file(file.uri, f"{bucket}/{file.path}")
    return root


@pytest.fixture
def world(published: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(published, tmp_path / "world"))


def no_ray(**_: Any) -> None:
    pytest.fail("Ray was started")


def none_runs(**_: Any) -> None:
    """What Ray says where it finds none on this machine."""
    raise ConnectionError("Could not find any running Ray instance.\nPlease specify")


@pytest.mark.parametrize(
    ("arguments", "fault", "status", "words"),
    [
        *(
            (arguments, fault, WRONG, "credentials")
            for arguments in (SOURCE, FEATURES, SPACE, MODEL, SCORED, OUTPUT, VERIFY)
            for fault in (DENIED, EXPIRED)
        ),
        *(
            (arguments, BUSY, AWAY, "s3://")
            for arguments in (SOURCE, FEATURES, MODEL, SCORED, OUTPUT, VERIFY)
        ),
        *((arguments, BROKEN, AWAY, "HTTP status 500") for arguments in (FEATURES, OUTPUT)),
        (MODEL, MANY, AWAY, "HTTP status 429"),
        (FEATURES, Fault(404, "NoSuchBucket"), WRONG, "is not a feature store"),
        (FEATURES, PAGE, WRONG, "is not JSON"),
        (STORE, ("features/manifest.json", Text("[]")), WRONG, "its manifest says None"),
        (STORE, ("features/manifest.json", empty), WRONG, "is not JSON"),
        (STORE, ("features/manifest.json", Text("\0\xff")), WRONG, "is not JSON"),
        (STORE, ("features/manifest.json", halve), WRONG, "is not JSON"),
        (STORE, ("features/features/0.parquet", empty), WRONG, "is damaged"),
        (STORE, ("features/features/0.parquet", halve), WRONG, "is damaged"),
        (STORE, ("features/features/0.parquet", flip), WRONG, "is damaged"),
        (STORE, ("features/features/0.parquet", remove), WRONG, "No such file"),
        (STORE, ("features/captions/0.parquet", empty), WRONG, "is damaged"),
        (STORE, ("features/captions/0.parquet", flip), WRONG, "is damaged"),
        (STORE, ("features/captions/0.parquet", remove), WRONG, "is missing"),
        (STORE, ("out/_job.json", Text("[]")), WRONG, "is damaged, or another program's"),
        (STORE, ("out/_job.json", empty), WRONG, "is damaged, or another program's"),
        (STORE, ("out/holiday.jpg", Text("")), WRONG, "is not empty"),
        (CAPTIONER, ("model/manifest.json", Text("[]")), WRONG, "its manifest says None"),
        (CAPTIONER, ("model/config.json", Text("[]")), WRONG, "is damaged"),
        (CAPTIONER, ("model/config.json", remove), WRONG, "No such file"),
        (CAPTIONER, ("model/vocab.json", Text("[]")), WRONG, "is damaged"),
        (CAPTIONER, ("model/weights.safetensors", halve), WRONG, "is damaged"),
        (CAPTIONER, ("model/encoder.safetensors", remove), WRONG, "is missing"),
    ],
)
def test_what_is_wrong_or_out_of_reach_is_one_line(
    world: Path,
    bucket: str,
    s3_server: S3Server,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    fault: Any,
    status: int,
    words: str,
) -> None:
    name, *rest = [text.format(bucket=bucket, world=world) for text in arguments]
    asked = name == "verify" or any(text.startswith("--output") for text in rest)
    monkeypatch.setattr("sys.argv", [name, *rest, *([] if asked else [f"--output={world}/out"])])
    monkeypatch.setattr(ray, "init", no_ray)
    with contextlib.ExitStack() as stack:
        if isinstance(fault, Fault):
            stack.enter_context(s3_server.failing(fault))
        else:
            path, damage = fault
            (world / path).parent.mkdir(exist_ok=True)
            damage(world / path)
        stop = stack.enter_context(pytest.raises(SystemExit))
        importlib.import_module(f"ray_jobs.{name}").main()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert words in line
    assert stop.value.code == status
    assert not (world / "out" / "manifest.json").exists()
    assert not storage.exists(f"{bucket}/out/manifest.json")


@pytest.mark.parametrize(
    ("address", "status", "words"),
    [
        ("nonsense", WRONG, "'nonsense' is not the host:port of a Ray head"),
        ("http://127.0.0.1:8265", WRONG, "is not the host:port of a Ray head"),
        ("127.0.0.1:9", AWAY, "no Ray answers at 127.0.0.1:9"),
        ("auto", AWAY, "no Ray answers at auto"),
    ],
)
def test_an_address_without_a_ray_is_one_line(
    world: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    address: str,
    status: int,
    words: str,
) -> None:
    monkeypatch.setattr(ray, "init", none_runs if address == "auto" else no_ray)
    monkeypatch.setenv("RAY_ADDRESS", address)
    arguments = [text.format(world=world) for text in CAPTIONER]
    monkeypatch.setattr("sys.argv", [*arguments, f"--output={world}/out"])
    with pytest.raises(SystemExit) as stop:
        importlib.import_module("ray_jobs.caption").main()
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert stop.value.code == status


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_job_that_is_ended_while_it_is_loaded_says_one_line(number: signal.Signals) -> None:
    child = subprocess.Popen(
        [sys.executable, "-v", "-m", "ray_jobs.train", "--features=x", "--output=y"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        # Children of what a shell started in its background ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert child.stderr is not None
    lines = iter(child.stderr.readline, "")
    # Python says what it has imported.
    assert any(line.startswith("import 'pyarrow.lib'") for line in lines)
    child.send_signal(number)
    rest = [line for line in lines if not line.startswith(("import ", "# "))]
    assert child.wait(timeout=60) == 128 + number
    assert rest == ["interrupted; the same command goes on from here\n"]
