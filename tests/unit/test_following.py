"""What a job names as the next command is one that runs."""

import os
import shlex
from pathlib import Path

import pytest

from captioner.artifacts.manifests import (
    CaptionsManifest,
    FileEntry,
    LikenessManifest,
    Manifest,
    ModelManifest,
    ReportManifest,
    SearchManifest,
    open_manifest,
)
from captioner.config import JobConfig, ServeConfig
from captioner.runtime import command_line, following
from ray_jobs.__main__ import JOBS
from tests.stores import write_store

PLACE = "/data/it's mine/José #1"


def read(line: str) -> tuple[str, JobConfig]:
    """A command as the program takes it."""
    program, name, *arguments = shlex.split(line)
    assert os.path.basename(program) == "captioner"
    config = command_line.parse(JOBS[name], arguments)
    assert isinstance(config, JobConfig)
    return name, config


def test_a_captioned_store_is_trained_on(tmp_path: Path) -> None:
    place = tmp_path / PLACE.removeprefix("/")
    store = write_store(place / "features", {"train": 2, "validation": 1})
    manifest = open_manifest(store, Manifest)
    name, config = read(str(following.after(f"{store}/", manifest)))
    assert name == "train"
    assert config.model_dump(include={"features", "output"}) == {
        "features": f"{store}/",
        "output": f"{place}/model",
    }
    (place / "model").mkdir()
    (place / "model-2").mkdir()
    _, config = read(str(following.after(store, manifest)))
    assert config.model_dump(include={"output"}) == {"output": f"{place}/model-3"}


def test_a_store_that_cannot_be_trained_on_is_checked(tmp_path: Path) -> None:
    store = write_store(tmp_path / "features", {"train": 2})
    name, config = read(str(following.after(store, open_manifest(store, Manifest))))
    assert (name, config.model_dump()) == ("verify", {"uri": store})


@pytest.mark.parametrize(
    ("manifest", "model"),
    [
        (ModelManifest(files=[]), PLACE),
        (SearchManifest.model_construct(), f"{PLACE}/model"),
        (ReportManifest.model_construct(model="hf:org/name"), "hf:org/name"),
        (CaptionsManifest.model_construct(model="s3://bucket/model"), "s3://bucket/model"),
    ],
)
def test_a_model_is_served(manifest: Manifest, model: str) -> None:
    _, config = read(str(following.after(PLACE, manifest)))
    assert isinstance(config, ServeConfig)
    assert [*config.models.values()] == [model]


def test_a_chat_model_is_asked_something() -> None:
    _, config = read(following.serve("hf:org/name", "What is it? One word."))
    assert isinstance(config, ServeConfig)
    assert config.decode.prompt == "What is it? One word."
    assert following.serve("hf:org/name", "").endswith("serve --model hf:org/name")


def test_pictures_are_looked_at() -> None:
    sheet = FileEntry(path="grid.png", bytes=1)
    found = following.after(PLACE, LikenessManifest.model_construct(files=[sheet]))
    assert shlex.split(str(found)) == ["look", "at", f"{PLACE}/grid.png"]
    assert following.after(PLACE, LikenessManifest.model_construct(files=[])) is None


def test_a_program_that_the_shell_does_not_find_is_named_by_its_place(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = tmp_path / "bin/captioner"
    script.parent.mkdir()
    script.touch(mode=0o755)
    monkeypatch.setattr("sys.executable", str(script.with_name("python")))
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.chdir(tmp_path)
    assert following.command("verify", "x y") == "bin/captioner verify 'x y'"
    monkeypatch.chdir("/")
    assert following.command("verify") == f"{str(script).removeprefix('/')} verify"
    monkeypatch.setenv("PATH", str(script.parent))
    assert following.command("verify") == "captioner verify"
