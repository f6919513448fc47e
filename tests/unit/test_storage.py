"""Storage: atomic files, exclusive manifests, claims on directories."""

import os
from pathlib import Path

import pytest

from captioner import storage
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
    with pytest.raises(StoreError, match="exists already"):
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


def test_relative_path_becomes_absolute_and_uri_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("runs/x/") == os.path.join(tmp_path, "runs/x")
    assert storage.absolute("s3://bucket/x/") == "s3://bucket/x"


@pytest.mark.parametrize("name", odd.NAMES)
@pytest.mark.parametrize("form", ["path", "file", "home"])
def test_a_name_is_taken_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, form: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    place = tmp_path / name / name
    odd.check({"path": str(place), "file": place.as_uri(), "home": f"~/{name}/{name}"}[form])
    assert (place / name).read_bytes() == b"data"


@pytest.mark.parametrize(
    ("uri", "same"),
    [
        ("file:{root}/a", "{root}/a"),
        ("FILE://localhost{root}/a", "{root}/a"),
        ("S3://bucket/Key/", "s3://bucket/Key"),
        ("s3://buck[et/key", "s3://buck[et/key"),
        ("{root}/a://b", "{root}/a:/b"),
    ],
)
def test_a_scheme_is_known_however_it_is_written(tmp_path: Path, uri: str, same: str) -> None:
    assert storage.absolute(uri.format(root=tmp_path)) == same.format(root=tmp_path)


@pytest.mark.parametrize("name", ["a#b", "what?", "a b", "a?b#c"])
def test_a_file_uri_need_not_be_escaped(tmp_path: Path, name: str) -> None:
    odd.check(f"file://localhost{tmp_path}/{name}")
    assert (tmp_path / name / name).exists()
