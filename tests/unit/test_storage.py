"""Storage: atomic files, exclusive manifests, claims on directories."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from captioner import storage
from captioner.artifacts.manifests import (
    FileEntry,
    Manifest,
    ModelManifest,
    StoreManifest,
    open_manifest,
)
from captioner.artifacts.output import WORK, Output, publish_once
from captioner.errors import StoreError
from tests import odd


def test_failed_write_leaves_neither_file_nor_fragment(tmp_path: Path) -> None:
    target = tmp_path / "data.bin"

    def write_half() -> None:
        with storage.atomic_writer(str(target)) as file:
            file.write(b"half")
            raise OSError("injected")

    with pytest.raises(StoreError, match="cannot write .*injected"):
        write_half()
    assert list(tmp_path.iterdir()) == []


def test_write_replaces_a_file_whole(tmp_path: Path) -> None:
    target = str(tmp_path / "deep" / "data.bin")
    storage.write_bytes(target, b"first version")
    storage.write_bytes(target, b"second")
    assert storage.read_bytes(target) == b"second"


def test_only_the_first_of_two_publishers_wins(tmp_path: Path) -> None:
    target = str(tmp_path / "manifest.json")
    storage.create_exclusively(target, b"one")
    with pytest.raises(StoreError, match="published first"):
        storage.create_exclusively(target, b"two")
    assert storage.read_bytes(target) == b"one"


def test_listing_is_recursive_sorted_and_empty_for_absent_directories(tmp_path: Path) -> None:
    for name in ("b/2.txt", "a.txt", "b/1.txt"):
        storage.write_bytes(str(tmp_path / name), name.encode())
    listed = storage.list_files(str(tmp_path))
    assert [file.path for file in listed] == ["a.txt", "b/1.txt", "b/2.txt"]
    assert [file.size for file in listed] == [5, 7, 7]
    assert storage.read_bytes(listed[1].uri) == b"b/1.txt"
    assert storage.list_files(str(tmp_path / "absent")) == []


def test_unknown_scheme_is_refused() -> None:
    with pytest.raises(StoreError, match="cannot open nowhere://x"):
        storage.resolve("nowhere://x")


def test_unpublished_directory_is_continued_by_the_same_job_only(tmp_path: Path) -> None:
    root = str(tmp_path / "out")
    Output(root, {"job": "x", "encoder": {"layer": "layer4"}}).close()
    again = Output(root, {"job": "x", "encoder": {"layer": "layer4"}})
    assert again.resumed
    assert not again.complete
    again.close()
    with pytest.raises(StoreError, match=r"encoder\.layer: 'layer4' there, 'layer3' asked"):
        Output(root, {"job": "x", "encoder": {"layer": "layer3"}})


def test_published_directory_is_complete_for_the_same_job_and_refused_to_another(
    tmp_path: Path,
) -> None:
    root = str(tmp_path / "out")
    output = Output(root, {"job": "x"})
    assert not output.complete
    output.publish(Manifest(kind="model", files=[]))
    assert Output(root, {"job": "x"}).complete
    with pytest.raises(StoreError, match="job: 'x' there, 'y' asked"):
        Output(root, {"job": "y"})


def test_work_that_another_run_has_deleted_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = Output(str(tmp_path / "out"), {"job": "x"})
    (tmp_path / "out" / WORK).mkdir()
    output.publish(Manifest(kind="model", files=[]))
    output.clear_work()
    assert not (tmp_path / "out" / WORK).exists()
    # Both have seen it.
    monkeypatch.setattr("captioner.artifacts.output.exists", lambda uri: True)
    output.clear_work()


def test_foreign_directory_is_never_written_into(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"precious")
    with pytest.raises(StoreError, match="not empty"):
        Output(str(tmp_path), {"job": "x"})
    assert [entry.name for entry in tmp_path.iterdir()] == ["holiday.jpg"]


def test_directory_being_written_by_a_live_process_is_refused_until_it_dies(tmp_path: Path) -> None:
    root = str(tmp_path / "out")
    program = (
        "import sys; from captioner.artifacts.output import Output\n"
        f"output = Output({root!r}, {{'job': 'x'}}); print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).resolve().parents[2],
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(StoreError, match="being written by another process"):
            Output(root, {"job": "x"})
        holder.kill()
    assert Output(root, {"job": "x"}).resumed


def test_relative_path_becomes_absolute_and_uri_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("runs/x/") == os.path.join(tmp_path, "runs/x")
    assert storage.absolute("s3://bucket/x/") == "s3://bucket/x"


def test_what_only_the_run_needed_goes_once_it_is_published(tmp_path: Path) -> None:
    identity, root = {"job": "x"}, str(tmp_path / "out")
    filled = []

    def fill(output: Output) -> ModelManifest:
        filled.append(output.resumed)
        storage.write_bytes(output.work("marks", "1"), b"done")
        return ModelManifest(files=[output.write("data/a", b"abc")])

    manifest = publish_once(root, identity, ModelManifest, fill)
    assert [(entry.path, entry.bytes) for entry in manifest.files] == [("data/a", 3)]
    assert not (tmp_path / "out" / "_work").exists()
    # A run killed between publishing and this leaves it to the next one.
    (tmp_path / "out" / "_work").mkdir()
    assert publish_once(root, identity, ModelManifest, fill) == manifest
    assert not (tmp_path / "out" / "_work").exists()
    assert filled == [False]


def test_an_unfinished_directory_is_filled_again(tmp_path: Path) -> None:
    def fail(output: Output) -> ModelManifest:
        storage.write_bytes(output.work("marks", "1"), b"done")
        raise StoreError("no space left")

    def go_on(output: Output) -> ModelManifest:
        assert output.resumed
        assert storage.exists(output.work("marks", "1"))
        return ModelManifest(files=[])

    root = str(tmp_path / "out")
    with pytest.raises(StoreError, match="no space left"):
        publish_once(root, {"job": "x"}, ModelManifest, fail)
    assert not (tmp_path / "out" / "manifest.json").exists()
    publish_once(root, {"job": "x"}, ModelManifest, go_on)
    assert (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "is not a feature store: its manifest says None"),
        ("{", "is not JSON"),
        ('{"kind": "model", "schema_version": 2, "files": []}', "its manifest says 'model'"),
        ('{"kind": "features", "schema_version": 1}', "written by an older release: extract again"),
        ('{"kind": "features", "schema_version": 2}', "is damaged: files: Field required"),
    ],
)
def test_other_manifests_are_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(StoreError, match=message) as caught:
        open_manifest(str(tmp_path), StoreManifest)
    assert "\n" not in str(caught.value)


def test_of_two_runs_of_one_command_both_end_with_the_one_that_was_first(tmp_path: Path) -> None:
    first = ModelManifest(files=[FileEntry(path="a", bytes=1)])

    def overtaken(output: Output) -> ModelManifest:
        (tmp_path / "out" / "manifest.json").write_text(first.model_dump_json())
        return ModelManifest(files=[])

    assert publish_once(str(tmp_path / "out"), {"job": "x"}, ModelManifest, overtaken) == first


@pytest.mark.parametrize("inside", ["", "/inside"])
def test_an_output_that_is_a_file_or_below_one_is_refused_in_one_line(
    tmp_path: Path, inside: str
) -> None:
    (tmp_path / "file").write_bytes(b"kept")
    with pytest.raises(StoreError, match=r"^cannot (list|write) .*: Not a directory$"):
        Output(f"{tmp_path}/file{inside}", {"job": "any"})
    assert (tmp_path / "file").read_bytes() == b"kept"


def test_a_name_that_is_too_long_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="^cannot look at .*: File name too long$"):
        Output(f"{tmp_path}/{'a' * 300}", {"job": "any"})


@pytest.mark.parametrize("name", odd.NAMES)
@pytest.mark.parametrize("form", ["path", "file", "home"])
def test_a_name_is_taken_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, form: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    place = tmp_path / name / name
    odd.check({"path": str(place), "file": place.as_uri(), "home": f"~/{name}/{name}"}[form])
    assert (place / name).read_bytes() == b"data"


@pytest.mark.parametrize("name", ["a#b", "what?", "a b", "a?b#c"])
def test_a_file_uri_need_not_be_escaped(tmp_path: Path, name: str) -> None:
    odd.check(f"file://localhost{tmp_path}/{name}")
    assert (tmp_path / name / name).exists()


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("file://elsewhere/data", "is on another host"),
        ("~nobody-of-this-name/data", "Could not determine home directory"),
        ("/data/\udcff", "is not UTF-8"),
    ],
)
def test_a_path_that_cannot_be_here_is_one_line(uri: str, message: str) -> None:
    with pytest.raises(StoreError, match=message) as one:
        Output(uri, {"job": "any"})
    assert "\n" not in str(one.value)
