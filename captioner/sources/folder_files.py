"""Reading the images of a folder, in runs that one task takes."""

from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from pyarrow.fs import FileSystem

from captioner import storage
from captioner.artifacts.tables import FINAL
from captioner.sources.outage import Outage, kind_of, of_place, reason_of
from captioner.sources.tasks import BYTES_PER_PIECE, source_rows

MOST_ROWS = 64


def cut(sizes: np.ndarray[Any, Any], most: int, largest: float) -> Iterator[tuple[int, int]]:
    """Bounds of runs of at most so many images, which end when they have so many bytes."""
    start, size = 0, 0
    for number, one in enumerate(sizes.tolist(), 1):
        size += one
        if number - start == most or size >= largest or number == len(sizes):
            yield start, number
            start, size = number, 0


def read(
    held: "pa.Table | ray.ObjectRef[pa.Table]",
    rows: range,
    uri: str,
    filesystem: FileSystem,
    paths: str | list[str],
    *,
    max_bytes: int,
    retry_seconds: float,
) -> Iterator[pa.Table]:
    """Read a run of images, a few at a time.

    Args:
        held: image_id, path, size and mtime.
        rows: those of ``held`` to read.
        uri: that the paths are below.
        paths: on the file system: the directory of all, or each file's own.
    """
    table = held if isinstance(held, pa.Table) else ray.get(held)
    table = table[rows.start : rows.stop]
    anywhere = not isinstance(paths, str)
    sizes = np.minimum(table["size"].to_numpy(), max_bytes)
    for first, last in cut(sizes, MOST_ROWS, BYTES_PER_PIECE / 2):
        some = table[first:last]
        batches = some.select(storage.FILE_SCHEMA.names).to_batches()
        files = list(storage.FileTable(uri, batches, anywhere=anywhere))
        if isinstance(paths, str):
            places = [f"{paths}/{file.path}" for file in files]
        else:
            places = paths[first:last]
        ids = some["image_id"].to_pylist()
        yield _read_files(ids, files, places, filesystem, max_bytes, retry_seconds)


def _read_files(
    ids: list[str],
    files: list[storage.FileInfo],
    places: list[str],
    filesystem: FileSystem,
    max_bytes: int,
    retry_seconds: float,
) -> pa.Table:
    data: list[bytes | None] = [None] * len(files)
    errors: list[str | None] = [None] * len(files)
    kinds: list[str | None] = [None] * len(files)
    waiting: deque[int] = deque()

    def is_over(number: int, size: int) -> bool:
        if size > max_bytes:
            errors[number], kinds[number] = f"{size} bytes, over the limit of {max_bytes}", FINAL
        return size > max_bytes

    for number, file in enumerate(files):
        if not is_over(number, file.size):
            waiting.append(number)
    outage = Outage(retry_seconds)
    while waiting:
        number = waiting.popleft()
        try:
            with filesystem.open_input_file(places[number]) as handle:
                if not is_over(number, handle.size()):  # it may have grown
                    data[number] = handle.read()
            outage.over()
        except (OSError, pa.ArrowException) as problem:
            path = places[number]
            root = path.removesuffix(f"/{files[number].path}")
            error = problem if root == path else of_place(problem, filesystem, root)
            # Another one comes next: what fails alone keeps nobody waiting.
            waiting.append(number)
            if outage.wait(error, files[number].uri):
                continue
            # Of an outage that lasts, all that is left hears the same.
            kind = kind_of(error)
            for each in [number] if kind == FINAL else list(waiting):
                waiting.remove(each)
                errors[each], kinds[each] = f"cannot be read: {reason_of(error)}", kind
    return source_rows(
        ids,
        [file.uri for file in files],
        data,
        errors,
        kinds,
        sizes=[file.size for file in files],
        mtime=[file.mtime for file in files],
    )
