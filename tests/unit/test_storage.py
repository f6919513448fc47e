"""Storage: atomic files, exclusive manifests, claims on directories."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from captioner import storage
from captioner.artifacts.output import Output
from captioner.errors import StoreError


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
    output.publish(json.dumps({"done": True}))
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
