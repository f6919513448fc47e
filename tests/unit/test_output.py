"""Directories that jobs publish: claimed, held by one run, filled, complete, continued, cleared."""

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
from captioner.errors import OutOfReachError, StoreError


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
        with pytest.raises(
            OutOfReachError,
            match=rf"by another process: x, process {holder.pid} of \S+ on \S+, since 2",
        ):
            Output(root, {"job": "x"})
        holder.kill()
    assert Output(root, {"job": "x"}).resumed


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
        ('{"kind": ["features"]}', r"its manifest says \['features'\]"),
        ("{", "is not JSON"),
        pytest.param("[" * 100_000, "is not JSON: maximum recursion depth", id="deep"),
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


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("file://elsewhere/data", "is on another host"),
        ("~nobody-of-this-name/data", "Could not determine home directory"),
        ("/data/\udcff", "is not UTF-8"),
        ("", "an empty path names nothing"),
        ("s3://", "s3:// names nothing"),
        ("hf://org/name", "not a place for files"),
    ],
)
def test_a_path_that_cannot_be_here_is_one_line(uri: str, message: str) -> None:
    with pytest.raises(StoreError, match=message) as one:
        Output(uri, {"job": "any"})
    assert "\n" not in str(one.value)


def test_names_that_are_no_text_are_in_nobodys_way(tmp_path: Path) -> None:
    def put(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        with open(os.fsencode(folder) + b"/\xff.txt", "wb") as file:
            file.write(b"mine")

    put(tmp_path / "foreign")
    with pytest.raises(StoreError, match="is not empty and was not made by this job"):
        Output(str(tmp_path / "foreign"), {"job": "x"})
    leave_unfinished(tmp_path / "out", {"job": "x"})
    put(tmp_path / "out")
    publish_once(str(tmp_path / "out"), {"job": "y"}, ModelManifest, fill, restart=True)
    assert len(os.listdir(tmp_path / "out")) == 4


def leave_unfinished(root: Path, identity: dict[str, object]) -> None:
    """What a run leaves that was killed while it filled its directory."""

    def fail(output: Output) -> ModelManifest:
        output.write("features/1.parquet", b"half of the work")
        storage.write_bytes(output.work("marks", "1"), b"done")
        raise StoreError("no space left")

    with pytest.raises(StoreError, match="no space left"):
        publish_once(str(root), identity, ModelManifest, fail)


def fill(output: Output) -> ModelManifest:
    assert not storage.exists(output.uri("features"))
    assert not storage.exists(output.work("marks"))
    return ModelManifest(files=[output.write("weights.safetensors", b"new")])


def contents(root: Path) -> dict[str, bytes]:
    """All but what says who had the directory last, and when."""
    found = {str(f.relative_to(root)): f.read_bytes() for f in root.rglob("*") if f.is_file()}
    found.pop("_work/lease", None)
    return found


@pytest.mark.parametrize(
    "identity", [{"job": "x", "size": 1}, {"job": "x", "size": 2}, {"job": "y"}]
)
def test_restart_clears_what_was_left_unfinished_and_nothing_else(
    tmp_path: Path, identity: dict[str, object]
) -> None:
    root = tmp_path / "out"
    leave_unfinished(root, {"job": "x", "size": 1})
    (root / "notes.txt").write_text("mine")
    if identity["job"] != "x" or identity["size"] != 1:
        with pytest.raises(
            StoreError, match="unfinished run of other settings: .*--restart"
        ) as one:
            publish_once(str(root), identity, ModelManifest, fill)
        assert "there," in str(one.value)
        assert "\n" not in str(one.value)
    publish_once(str(root), identity, ModelManifest, fill, restart=True)
    assert contents(root).keys() == {
        "_job.json",
        "manifest.json",
        "weights.safetensors",
        "notes.txt",
    }
    # It is published now, and stays.
    before = contents(root)
    publish_once(str(root), identity, ModelManifest, pytest.fail, restart=True)
    with pytest.raises(StoreError, match="was made by another run: .*: choose another$"):
        publish_once(str(root), {"job": "z"}, ModelManifest, pytest.fail, restart=True)
    assert contents(root) == before


def test_restart_clears_no_published_directory_inside_and_nothing_foreign(tmp_path: Path) -> None:
    root = tmp_path / "out"
    leave_unfinished(root, {"job": "x"})
    publish_once(str(root / "model"), {"job": "train"}, ModelManifest, fill)
    before = contents(root)
    for what in ("published directory", "directory of another run"):
        with pytest.raises(StoreError, match=f"holds a {what}, model, and is not cleared"):
            publish_once(str(root), {"job": "x"}, ModelManifest, fill, restart=True)
        assert contents(root) == before
        (root / "model" / "manifest.json").unlink(missing_ok=True)
        before = contents(root)
    foreign = tmp_path / "foreign"
    (foreign / "features").mkdir(parents=True)
    (foreign / "features" / "a.jpg").write_bytes(b"precious")
    for claim in (None, "", "[]", '{"name": "of another program"}'):
        if claim is not None:
            (foreign / "_job.json").write_text(claim)
        before = contents(foreign)
        with pytest.raises(StoreError, match="choose another"):
            publish_once(str(foreign), {"job": "x"}, ModelManifest, fill, restart=True)
        assert contents(foreign) == before


def test_clearing_that_was_killed_goes_on_in_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "out"
    leave_unfinished(root, {"job": "x", "size": 1})
    with monkeypatch.context() as patch:
        patch.setattr("captioner.artifacts.output.delete", lambda uri: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            Output(str(root), {"job": "x", "size": 2}, restart=True)
    assert (root / "features").exists()
    # Whatever it is given, and not asked again: what is left there is nobody's any more.
    publish_once(str(root), {"job": "x", "size": 3}, ModelManifest, fill)


def test_a_live_run_is_not_cleared(tmp_path: Path) -> None:
    with (
        Output(str(tmp_path / "out"), {"job": "x"}),
        pytest.raises(OutOfReachError, match="being written by another process"),
    ):
        Output(str(tmp_path / "out"), {"job": "y"}, restart=True)


def test_what_a_killed_writer_leaves_stops_nothing_and_goes(tmp_path: Path) -> None:
    """A file is written beside its place; the claim, too: then there is nothing but such a file."""
    root, half = tmp_path / "out", f"{'0' * 32}.partial"
    root.mkdir()
    (root / f"_job.json.{half}").write_text("{")

    def fill(output: Output) -> ModelManifest:
        (root / f"vocab.json.{half}").write_text("[")
        (root / "holiday.partial").write_text("mine")
        return ModelManifest(files=[output.write("vocab.json", b"[]")])

    publish_once(str(root), {"job": "x"}, ModelManifest, fill)
    names = {"_job.json", "manifest.json", "vocab.json", "holiday.partial"}
    assert contents(root).keys() == names
    # And what is left between publishing and tidying.
    (root / f"manifest.json.{half}").write_text("{")
    (root / WORK).mkdir()
    publish_once(str(root), {"job": "x"}, ModelManifest, pytest.fail)
    assert contents(root).keys() == names
    assert not (root / WORK).exists()


def test_where_there_are_no_hard_links_one_line_says_what_that_means(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", refuse)
    publish_once(str(tmp_path / "out"), {"job": "x"}, ModelManifest, fill)
    assert contents(tmp_path / "out").keys() == {
        "_job.json",
        "manifest.json",
        "weights.safetensors",
    }
    (line,) = [record.message for record in caplog.records if "hard links" in record.message]
    assert "run one at a time" in line
    with pytest.raises(StoreError, match="exists already"):
        storage.create_exclusively(str(tmp_path / "out" / "manifest.json"), b"another")
