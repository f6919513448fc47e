"""Images not read by a fault that may pass: they get no row and no mark, and the same command tries them again."""

import io
import uuid
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from captioner import storage
from captioner.artifacts.output import Output
from captioner.artifacts.tables import RETRYABLE
from captioner.errors import OutOfReachError
from captioner.features.row_marks import finished
from captioner.sources.outage import patiently

UNREADABLE = "unreadable"
_READERS = 16


def set_aside(rows: pa.Table, folder: str, retry_seconds: float) -> pa.Table:
    """The rows without those that could not be read, which are noted in a file of ``folder``.

    Raises:
        OutOfReachError: that cannot be written, for so long.
    """
    failed = pc.fill_null(pc.equal(rows["error_kind"], RETRYABLE), False)
    if not pc.any(failed).as_py():
        return rows
    columns = ["image_id", "uri", "size", "mtime", "error", "error_kind"]
    file = io.BytesIO()
    pq.write_table(rows.filter(failed).select(columns), file)
    # A task that Ray repeats notes them again, which is no more than that.
    note = storage.join(folder, f"{uuid.uuid4().hex}.parquet")
    # The store is often the one that they could not be read from.
    patiently(retry_seconds, lambda: storage.write_bytes(note, file.getvalue()))
    return rows.filter(pc.invert(failed))


def discard_unreadable(output: Output, directory: str) -> None:
    """Forget what an earlier run of the output could not read: this one tries again."""
    storage.delete(output.work(UNREADABLE))
    storage.delete(_accepted(output, directory))


def settle_unreadable(
    output: Output, directory: str, schema: pa.Schema, total: int, *, accept: bool
) -> None:
    """Give the images that could not be read rows of ``schema``, in a file of their own, where that is accepted.

    Raises:
        OutOfReachError: it is not.
    """
    notes = storage.list_files(output.work(UNREADABLE))
    if not notes:
        return
    with ThreadPoolExecutor(_READERS) as readers:
        tables = list(readers.map(_read, notes))
    rows = pa.concat_tables(tables)
    done = finished(output)
    first = rows.append_column("row", pa.array(range(len(rows)))).group_by("image_id")
    rows = rows.take(first.aggregate([("row", "min")])["row_min"])
    # What a repeated task read after all is done.
    rows = rows.filter(pa.array(~done.holds(rows["image_id"].to_pylist())))
    if not len(rows):
        return
    if not accept:
        one = rows.slice(0, 1).to_pylist()[0]
        raise OutOfReachError(
            f"{len(rows):,} of {total:,} images could not be read, {one['image_id']} first: {one['error']}; the others "
            "are done and kept: the same command tries these again, --accept-unreadable goes on without them"
        )
    for field in schema:
        if field.name not in rows.column_names:
            rows = rows.append_column(field, pa.nulls(len(rows), field.type))
    file = io.BytesIO()
    pq.write_table(rows.select(schema.names).cast(schema), file, write_page_checksum=True)
    storage.write_bytes(_accepted(output, directory), file.getvalue())


def _accepted(output: Output, directory: str) -> str:
    return output.uri(directory, "unreadable.parquet")


def _read(file: storage.FileInfo) -> pa.Table:
    with storage.reading(file.uri):
        return pq.read_table(io.BytesIO(storage.read_bytes(file.uri)))
