"""What tests of sources share: tiny sources on disk, and reading them by their tasks alone, without a Ray."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from captioner.artifacts.schema import CAPTION_ROWS, SOURCE_ROWS
from captioner.sources.base import Source

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def read_all(source: Source) -> list[dict[str, Any]]:
    """All rows, by the tasks alone, without Ray."""
    rows = []
    for task in source.images().get_read_tasks(1):
        tables = list(task())
        assert sum(len(table) for table in tables) == task.metadata.num_rows
        for table in tables:
            assert table.schema == SOURCE_ROWS
            rows += table.to_pylist()
    assert len(rows) == source.num_images()
    assert len({row["image_id"] for row in rows}) == len(rows)
    return rows


def captions_of(source: Source) -> dict[str, list[str]]:
    captions: dict[str, list[str]] = {}
    for batch in source.captions():
        assert batch.schema == CAPTION_ROWS
        for row in batch.to_pylist():
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
