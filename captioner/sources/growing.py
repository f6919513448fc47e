"""A source seen from a collection that grows: what of it is to be done, under which ids."""

from collections.abc import Iterator
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc

from captioner.artifacts.id_set import NONE, IdSet
from captioner.artifacts.manifests import SourceIdentity
from captioner.sources.base import Listed, Source
from captioner.sources.outage import RETRY_SECONDS
from captioner.sources.tasks import Piece, PieceSource


class Prefixed:
    """A source whose ids begin with a prefix, so that they are not those of another source."""

    def __init__(self, source: Source, prefix: str):
        self._source, self._prefix = source, prefix

    def identity(self) -> SourceIdentity:
        own = self._source.identity()
        return own.model_copy(update={"options": own.options | {"id_prefix": self._prefix}})

    def files(self) -> Iterator[Listed]:
        return self._source.files()

    def states(self) -> Iterator[pa.RecordBatch]:
        return map(self._rename, self._source.states())

    def num_images(self) -> int:
        return self._source.num_images()

    def images(self, done: IdSet = NONE, /, *, retry_seconds: float = RETRY_SECONDS) -> PieceSource:
        found = self._source.images(done.behind(self._prefix), retry_seconds=retry_seconds)
        pieces = [
            Piece(partial(_renamed, piece, self._prefix), piece.rows, piece.size)
            for piece in found.pieces
        ]
        return PieceSource(found.get_name(), pieces)

    def captions(self) -> Iterator[pa.RecordBatch]:
        return map(self._rename, self._source.captions())

    def left_out(self) -> dict[str, int]:
        return self._source.left_out()

    def _rename(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        return _with_prefix(batch, self._prefix)


class Remaining:
    """A source without the images that a collection has already."""

    def __init__(self, source: Source, kept: IdSet, left: int):
        """
        Args:
            left: how many images are not among those that are kept.
        """
        self._source, self._kept, self._left = source, kept, left

    def identity(self) -> SourceIdentity:
        return self._source.identity()

    def files(self) -> Iterator[Listed]:
        return self._source.files()

    def states(self) -> Iterator[pa.RecordBatch]:
        return self._source.states()

    def num_images(self) -> int:
        return self._left

    def images(self, done: IdSet = NONE, /, *, retry_seconds: float = RETRY_SECONDS) -> PieceSource:
        return self._source.images(self._kept | done, retry_seconds=retry_seconds)

    def captions(self) -> Iterator[pa.RecordBatch]:
        return self._source.captions()

    def left_out(self) -> dict[str, int]:
        return self._source.left_out()


def _renamed(piece: Piece, prefix: str) -> Iterator[pa.Table]:
    for table in piece.read():
        yield _with_prefix(table, prefix)


def _with_prefix(rows: pa.Table, prefix: str) -> pa.Table:
    place = rows.schema.get_field_index("image_id")
    ids = pc.binary_join_element_wise(prefix, rows["image_id"], "")
    return rows.set_column(place, rows.schema.field(place), ids)
