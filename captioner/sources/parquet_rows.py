"""Reading the images of Parquet files in slices: whole row groups together, or parts of one."""

import math
import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow.fs import FileSystem

from captioner import storage
from captioner.artifacts.id_set import IdSet
from captioner.artifacts.tables import FINAL
from captioner.config import Split
from captioner.sources.outage import (
    RETRY_SECONDS,
    Outage,
    is_of_picture,
    kind_of,
    of_place,
    reason_of,
)
from captioner.sources.parquet_files import InspectedFile
from captioner.sources.splits import hashed_split
from captioner.sources.tasks import source_rows

ROWS_PER_PIECE = 128
# Parquet is read from the start of a row group, so a slice of one reads what lies before it too. Eight slices read
# their group 4.5 times over, whatever its size.
SLICES_PER_GROUP = 8
BYTES_PER_TABLE = 16 * 2**20
_FILES_PER_TABLE, _LARGEST_FILE = 8, 2**30
# Read page by page; the default takes in the image column of a whole row group at once, of any size.
_READ_BUFFER = 4 * 2**20


@dataclass(frozen=True)
class Labels:
    """Ids and splits of consecutive rows of a file."""

    prefix: str
    """What the ids begin with."""
    first: int
    """Number of the first row."""
    split: Split | None
    """Split of all rows; None: by a hash of each id."""
    column: tuple[Split | None, ...] | None = None
    """Split of each row, None for a row that a limit leaves out; instead of ``split``."""
    ids: tuple[str, ...] | None = None
    """Id of each row; instead of ``prefix`` and ``first``."""

    def image_id(self, row: int) -> str:
        return f"{self.prefix}/{self.first + row:06d}" if self.ids is None else self.ids[row]

    def split_of(self, row: int) -> Split | None:
        if self.column is not None:
            return self.column[row]
        return self.split or hashed_split(self.image_id(row))

    def taken(self, rows: range) -> Sequence[int]:
        """The rows that no limit leaves out."""
        if self.column is None:
            return rows
        return [row for row in rows if self.column[row] is not None]

    def cut(self, rows: range) -> "Labels":
        """The labels of some of the rows, which then begin at 0."""
        column = None if self.column is None else self.column[rows.start : rows.stop]
        ids = None if self.ids is None else self.ids[rows.start : rows.stop]
        return replace(self, first=self.first + rows.start, column=column, ids=ids)


@dataclass(frozen=True)
class Slice:
    """Rows that one task reads."""

    filesystem: FileSystem
    path: str
    uri: str
    column: str
    groups: range
    skip: int
    """Rows of ``groups`` before the first one."""
    rows: range
    """Numbers of the rows in the file."""
    rows_per_table: int
    labels: Labels
    """Those of ``rows``, from 0."""
    mtime: int | None
    """Of the file, nanoseconds since 1970."""

    def without(self, done: IdSet) -> "Slice":
        """The same without the rows whose images are done, which ends with the last one that is not."""
        taken = self.labels.taken(range(len(self.rows)))
        over = done.holds([self.labels.image_id(row) for row in taken])
        if not over.any():
            return self
        left = {row for row, finished in zip(taken, over, strict=True) if not finished}
        stop = max(left, default=-1) + 1
        column = tuple(self.labels.split_of(row) if row in left else None for row in range(stop))
        return replace(self, rows=self.rows[:stop], labels=replace(self.labels, column=column))

    def read(self, retry_seconds: float = RETRY_SECONDS) -> Iterator[pa.Table]:
        """``tables.SOURCE_ROWS``; where the file turns out to be damaged, the rows left have an error."""
        done, outage = 0, Outage(retry_seconds)
        while True:
            try:
                for batch in self.cells(done):
                    # The files that rows name may be large.
                    most = len(batch) if _parts(batch)[1] is None else _FILES_PER_TABLE
                    for start in range(0, len(batch), most):
                        cells = batch[start : start + most]
                        table = self._table(done, cells)
                        outage.over()
                        yield table
                        done += len(cells)
                return
            except (pa.ArrowException, OSError) as error:
                problem = of_place(error, self.filesystem, posixpath.dirname(self.path))
                if not outage.wait(problem, self.uri):
                    cells = pa.nulls(len(self.rows) - done, pa.large_binary())
                    why = f"cannot be read: {reason_of(problem)}"
                    yield self._table(done, cells, (why, kind_of(problem)))
                    return

    def cells(self, done: int = 0) -> Iterator[pa.Array]:
        """The image column of the rows, in parts of ``rows_per_table``, without the first ``done``."""
        position, end = -self.skip - done, len(self.rows) - done
        with self.filesystem.open_input_file(self.path) as handle:
            file = pq.ParquetFile(handle, buffer_size=_READ_BUFFER, pre_buffer=False)
            for batch in file.iter_batches(
                batch_size=self.rows_per_table, row_groups=list(self.groups), columns=[self.column]
            ):
                column = batch.column(0)[max(0, -position) : max(0, end - position)]
                position += len(batch)
                if len(column):
                    yield column
                if position >= end:
                    return

    def _table(self, done: int, cells: pa.Array, failed: tuple[str, str] | None = None) -> pa.Table:
        """Rows of the column's cells.

        Args:
            failed: why there are none, and the kind of the error.
        """
        taken = self.labels.taken(range(done, done + len(cells)))
        if len(taken) < len(cells):
            cells = cells.take(pa.array([row - done for row in taken], pa.int64()))
        cells, paths = _parts(cells)
        errors = [
            None if there else failed or ("no image bytes in the row", FINAL)
            for there in cells.is_valid().to_pylist()
        ]
        if paths is not None and failed is None:
            data: list[bytes | None] = cells.to_pylist()
            for row, path in enumerate(paths.cast(pa.large_binary()).to_pylist()):
                if data[row] is None and path:
                    data[row], errors[row] = self._beside(path)
            cells = pa.array(data, pa.large_binary())
        return source_rows(
            [self.labels.image_id(row) for row in taken],
            [f"{self.uri}#{self.rows[row]}" for row in taken],
            cells,
            [error and error[0] for error in errors],
            [error and error[1] for error in errors],
            sizes=pc.binary_length(cells),
            mtime=self.mtime,
        )

    def _beside(self, name: bytes) -> tuple[bytes | None, tuple[str, str] | None]:
        """A file that a row names instead of holding it; relative names begin where the Parquet file is."""
        path = name.decode(errors="replace")
        place = posixpath.join(posixpath.dirname(self.path), path)
        try:
            with self.filesystem.open_input_file(place) as handle:
                if handle.size() > _LARGEST_FILE:
                    return None, (f"{path} has {handle.size():,} bytes", FINAL)
                return handle.read(), None
        except (pa.ArrowException, OSError) as problem:
            if not is_of_picture(problem, self.uri):
                raise
            return None, (f"{path} cannot be read: {reason_of(problem)}", FINAL)


def _parts(cells: pa.Array) -> tuple[pa.Array, pa.Array | None]:
    """The encoded images of a column as large_binary, and the paths of images that are files, if there are any."""
    if not pa.types.is_struct(cells.type):
        if pa.types.is_dictionary(cells.type):
            cells = cells.dictionary_decode()
        return cells.cast(pa.large_binary()), None
    names = {field.name for field in cells.type}
    paths = pc.struct_field(cells, "path") if "path" in names else None
    if "bytes" in names:
        data, _ = _parts(pc.struct_field(cells, "bytes"))
    else:
        data = pa.nulls(len(cells), pa.large_binary())
    return data, paths if data.null_count else None


def slices(file: InspectedFile, labels: Labels, rows: int) -> Iterator[Slice]:
    """The first ``rows`` rows of a file, small row groups together and large ones cut."""
    # Opened once and sent along: workers may lack the endpoint of an S3 store.
    filesystem, path = storage.resolve(file.uri)
    group, row = 0, 0
    while row < rows:
        first, there = group, 0
        while group < len(file.groups) and (
            there == 0 or there + file.groups[group] <= ROWS_PER_PIECE
        ):
            there += file.groups[group]
            group += 1
        keep = min(there, rows - row)
        step = math.ceil(keep / min(math.ceil(keep / ROWS_PER_PIECE), SLICES_PER_GROUP))
        for skip in range(0, keep, step):
            part = range(row + skip, row + min(skip + step, keep))
            yield Slice(
                filesystem,
                path,
                file.uri,
                file.columns.image,
                range(first, group),
                skip,
                part,
                _rows_per_table(file),
                labels.cut(part),
                file.mtime,
            )
        row += there


def _rows_per_table(file: InspectedFile) -> int:
    return max(1, min(ROWS_PER_PIECE, BYTES_PER_TABLE * file.rows // file.size))
