"""What tests of sources share: tiny sources on disk, and reading them by their tasks alone, without a Ray."""

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from captioner.artifacts.id_set import IdSet
from captioner.artifacts.tables import CAPTION_ROWS, SOURCE_ROWS
from captioner.sources.base import Source

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def read_all(source: Source) -> list[dict[str, Any]]:
    """All rows, by the tasks alone, without Ray; with the split of each, which comes with the captions."""
    splits = {row["image_id"]: row["split"] for row in caption_rows(source)}
    rows = []
    for task in source.images().get_read_tasks(1):
        tables = list(task())
        assert sum(len(table) for table in tables) == task.metadata.num_rows
        for table in tables:
            assert table.schema == SOURCE_ROWS
            rows += [row | {"split": splits[row["image_id"]]} for row in table.to_pylist()]
    assert splits.keys() == {row["image_id"] for row in rows}
    assert len(rows) == source.num_images()
    assert len({row["image_id"] for row in rows}) == len(rows)
    return rows


def rows_left(source: Source, done: Sequence[str]) -> list[dict[str, Any]]:
    """The rows that tasks read where others are done; those that are announced and those that are read are as many."""
    found: list[dict[str, Any]] = []
    for task in source.images(IdSet([done])).get_read_tasks(1):
        read = [row for table in task() for row in table.to_pylist()]
        assert len(read) == task.metadata.num_rows > 0
        found += read
    return found


def ids_left(source: Source, done: Sequence[str]) -> list[str]:
    return [row["image_id"] for row in rows_left(source, done)]


def caption_rows(source: Source) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for batch in source.captions():
        assert batch.schema == CAPTION_ROWS
        rows += batch.to_pylist()
    return rows


def captions_of(source: Source) -> dict[str, list[str]]:
    captions: dict[str, list[str]] = {}
    for row in caption_rows(source):
        if row["caption"] is None:
            assert row["index"] is None
            assert row["image_id"] not in captions
            continue
        texts = captions.setdefault(row["image_id"], [])
        assert row["index"] == len(texts)
        texts.append(row["caption"])
    return captions


def picture(name: str) -> bytes:
    """Not an image: sources never look inside."""
    return f"bytes of {name}".encode()


def write_images(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture(name))


def write_parquet(
    path: Path, rows: int, *, captions: str | None = "numbered", row_group_size: int = 100
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    numbers = range(rows)
    columns: dict[str, Any] = {
        "image": pa.array(
            [{"bytes": picture(f"{path.name}/{n}"), "path": None} for n in numbers], IMAGE
        )
    }
    if captions == "numbered":
        # Eleven columns: caption_10 comes after caption_9, not after caption_1.
        columns |= {f"caption_{k}": [f"{path.name} {n} {k}" for n in numbers] for k in range(11)}
    elif captions:
        columns[captions] = pa.array(
            [[f"{path.name} {n} {k}" for k in range(n % 3)] for n in numbers]
        )
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)


def write_shard(path: Path, members: dict[str, bytes], mode: str = "w") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as shard:  # type: ignore[call-overload]
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            shard.addfile(entry, io.BytesIO(content))


def read_uri(uri: str) -> bytes:
    """What a row's ``uri`` names: a file, or the row of a Parquet file."""
    file, _, row = uri.rpartition("#")
    if file.endswith(".parquet") and row.isdigit():
        cell = pq.read_table(io.BytesIO(Path(file).read_bytes()), columns=["image"])["image"][
            int(row)
        ].as_py()
        return bytes(cell["bytes"] if isinstance(cell, dict) else cell)
    return Path(uri).read_bytes()
