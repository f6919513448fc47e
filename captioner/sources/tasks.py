"""A Ray Data datasource made of independent pieces, each emitting ``tables.SOURCE_ROWS``."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
from ray.data import DataContext, Datasource
from ray.data.block import BlockMetadata
from ray.data.datasource import ReadTask

from captioner.artifacts.tables import SOURCE_ROWS, STATES

BYTES_PER_PIECE = 64 * 2**20


@dataclass(frozen=True)
class Piece:
    """Part of a source that one task reads: small enough to be a block, and the unit of a checkpoint."""

    read: Callable[[], Iterator[pa.Table]]
    rows: int
    size: int
    """Encoded bytes, roughly."""


class PieceSource(Datasource):
    """Ray Data's view of a source; one read task per piece, whatever parallelism is asked for.

    Where that is more than there are pieces, Ray Data cuts the blocks that the tasks return.
    """

    def __init__(self, name: str, pieces: Sequence[Piece]):
        super().__init__()
        self._name = name
        self.pieces = pieces

    def get_name(self) -> str:
        return self._name

    def estimate_inmemory_data_size(self) -> int | None:
        return sum(piece.size for piece in self.pieces)

    def get_read_tasks(
        self,
        parallelism: int,
        per_task_row_limit: int | None = None,
        data_context: DataContext | None = None,
    ) -> list[ReadTask]:
        return [
            ReadTask(
                piece.read,
                BlockMetadata(
                    num_rows=piece.rows, size_bytes=piece.size, input_files=None, exec_stats=None
                ),
                schema=SOURCE_ROWS,
                per_task_row_limit=per_task_row_limit,
            )
            for piece in self.pieces
        ]


def source_rows(
    ids: Sequence[str],
    uris: Sequence[str],
    data: Sequence[bytes | None] | pa.Array | pa.ChunkedArray,
    errors: Sequence[str | None],
    kinds: Sequence[str | None],
    *,
    sizes: Sequence[int | None] | pa.Array,
    mtime: int | None | Sequence[int | None] = None,
) -> pa.Table:
    """A table of ``tables.SOURCE_ROWS``.

    Args:
        sizes: encoded bytes.
        mtime: nanoseconds since 1970, of each image or of all.
    """
    times = [mtime] * len(ids) if mtime is None or isinstance(mtime, int) else mtime
    columns = (ids, uris, sizes, times, data, errors, kinds)
    return pa.table(dict(zip(SOURCE_ROWS.names, columns, strict=True)), schema=SOURCE_ROWS)


def states(
    ids: Sequence[str], sizes: Sequence[int | None], times: Sequence[int | None]
) -> pa.RecordBatch:
    """``tables.STATES`` of images.

    Args:
        sizes: encoded bytes.
        times: nanoseconds since 1970.
    """
    columns = zip((ids, sizes, times), STATES.types, strict=True)
    return pa.record_batch([pa.array(values, kind) for values, kind in columns], schema=STATES)
