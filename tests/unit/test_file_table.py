"""Listings in columns: the same files in the same order as a list of them, at twenty bytes more than their names."""

import tracemalloc
from pathlib import Path

import pytest

from captioner import storage
from captioner.sources.listing import list_place
from captioner.storage import FileInfo, FileTable, file_table


def files(count: int) -> list[FileInfo]:
    return [FileInfo(f"/x/{n:055d}", f"{n:055d}", n, n * 10**9) for n in range(count)]


def test_a_table_is_a_sequence_of_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_table, "BATCH", 7)
    found = files(30)
    table = FileTable.collect("/x", iter(found))
    assert (len(table), list(table), table[3:9]) == (30, found, found[3:9])
    assert [table[0], table[6], table[7], table[-1]] == [found[0], found[6], found[7], found[29]]
    with pytest.raises(IndexError):
        table[30]
    even = table.take(lambda file: file.size % 2 == 0)
    assert (list(even), list(table)) == (found[::2], found[1::2])
    assert list(FileTable.collect("/x", iter(()))) == []


def test_a_file_takes_its_name_and_some_twenty_bytes() -> None:
    count = 120_000
    tracemalloc.start()
    try:
        table = FileTable.collect("/x", (one for n in range(0, count, 1000) for one in files(1000)))
        python = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert python / count < 1
    assert sum(batch.nbytes for batch in table.batches()) / count < 55 + 21


def test_a_directory_is_listed_in_the_order_of_paths(tmp_path: Path) -> None:
    names = [
        "a.jpg",
        "a/b.jpg",
        "a/b/c.jpg",
        "a/b-.jpg",
        "a-b/c.jpg",
        "a0.jpg",
        "é.jpg",
        "b/z/1.jpg",
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    listed, left_out = list_place(str(tmp_path))
    assert [file.path for file in listed] == sorted(names)
    assert list(listed) == storage.list_files(str(tmp_path))
    assert left_out == {}
