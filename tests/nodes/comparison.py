"""What is in the bucket, and how an undisturbed run of a job is compared with one that lost a node."""

import time
from collections.abc import Callable

import pyarrow as pa
import pyarrow.parquet as pq

from captioner import storage

SIZES = {"train": 80, "validation": 16}
BAD = ("cut.png", "empty.jpg", "text.jpg")
IMAGES = sum(SIZES.values()) + len(BAD)
# Of the table that the summary prints: job, fault, lost rows, repeated rows, seconds without and with the fault.
ROWS: list[tuple[str, ...]] = []


def timed(job: Callable[[], object]) -> float:
    started = time.monotonic()
    job()
    return time.monotonic() - started


def read_rows(uri: str) -> pa.Table:
    filesystem, path = storage.resolve(uri)
    return pq.read_table(path, filesystem=filesystem).sort_by("image_id")


def compare(
    job: str, fault: str, uris: tuple[str, str], seconds: tuple[float, float]
) -> tuple[pa.Table, pa.Table]:
    """Rows of the undisturbed run and of the disturbed one, which must be of the same images, each once."""
    expected, found = (read_rows(uri) for uri in uris)
    names, there = expected["image_id"].to_pylist(), found["image_id"].to_pylist()
    lost, repeated = len(set(names) - set(there)), len(there) - len(set(there))
    report(job, fault, str(lost), str(repeated), seconds)
    assert there == names
    assert len(set(names)) == len(names) == IMAGES
    assert found["error"].to_pylist() == expected["error"].to_pylist()
    assert {
        name for name, error in zip(there, found["error"].to_pylist(), strict=True) if error
    } == set(BAD)
    return expected, found


def report(job: str, fault: str, lost: str, repeated: str, seconds: tuple[float, float]) -> None:
    ROWS.append((job, fault, lost, repeated, f"{seconds[0]:.0f} s", f"{seconds[1]:.0f} s"))
