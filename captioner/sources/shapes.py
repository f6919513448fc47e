"""Generated scenes as a source: a data set that needs no network and no disk, drawn by the tasks that read it."""

from collections.abc import Iterator, Sequence
from functools import partial

import pyarrow as pa

from captioner.artifacts.id_set import NONE, IdSet
from captioner.artifacts.manifests import SourceIdentity
from captioner.artifacts.tables import CAPTION_ROWS, SPLITS
from captioner.config import ShapesConfig
from captioner.sources.base import Listed
from captioner.sources.outage import RETRY_SECONDS
from captioner.sources.place import Place
from captioner.sources.scenes import draw_scene, make_scene
from captioner.sources.tasks import Piece, PieceSource, source_rows, states

ROWS_PER_PIECE = 100
_BYTES_PER_IMAGE = 3_000
# Part of the identity: raised when the same seed draws other pictures or says other things about them.
_VERSION = 1
NAMES = ("shapes",)
OPTIONS = frozenset(("limit", "shapes"))
"""Settings of ``SourceConfig`` that say something here."""


def open_place(place: Place) -> "ShapesSource | None":
    """The generated data set, where its name is asked for."""
    if place.spec not in NAMES:
        return None
    return ShapesSource(place.options.shapes, place.options.limit)


class ShapesSource:
    """The generated data set."""

    def __init__(self, config: ShapesConfig, limit: int | None = None):
        self.config = config
        self.limit = limit

    def identity(self) -> SourceIdentity:
        return SourceIdentity(
            kind="shapes",
            uri="shapes",
            options=self.config.model_dump() | {"limit": self.limit, "version": _VERSION},
        )

    def files(self) -> Iterator[Listed]:
        yield from ()

    def states(self) -> Iterator[pa.RecordBatch]:
        for split in SPLITS:
            ids = [_image_id(split, index) for index in range(self._size(split))]
            yield states(ids, [None] * len(ids), [None] * len(ids))

    def num_images(self) -> int:
        return sum(self._size(split) for split in SPLITS)

    def images(self, done: IdSet = NONE, /, *, retry_seconds: float = RETRY_SECONDS) -> PieceSource:
        pieces = []
        for split in SPLITS:
            for start in range(0, self._size(split), ROWS_PER_PIECE):
                indices = range(start, min(start + ROWS_PER_PIECE, self._size(split)))
                finished = done.holds([_image_id(split, index) for index in indices])
                left = [index for index, over in zip(indices, finished, strict=True) if not over]
                if left:
                    read = partial(_read, self.config.seed, split, left)
                    pieces.append(Piece(read, len(left), len(left) * _BYTES_PER_IMAGE))
        return PieceSource("Shapes", pieces)

    def captions(self) -> Iterator[pa.RecordBatch]:
        for split in SPLITS:
            rows = [
                {
                    "image_id": _image_id(split, index),
                    "split": split,
                    "caption": caption,
                    "index": number,
                }
                for index in range(self._size(split))
                for number, caption in enumerate(
                    make_scene(self.config.seed, split, index).captions()
                )
            ]
            yield pa.RecordBatch.from_pylist(rows, CAPTION_ROWS)

    def left_out(self) -> dict[str, int]:
        over = sum(getattr(self.config, split) - self._size(split) for split in SPLITS)
        return {"over the limit": over} if over else {}

    def _size(self, split: str) -> int:
        size: int = getattr(self.config, split)
        return size if self.limit is None else min(size, self.limit)


def _image_id(split: str, index: int) -> str:
    return f"{split}-{index:06d}"


def _read(seed: int, split: str, indices: Sequence[int]) -> Iterator[pa.Table]:
    data = [draw_scene(seed, split, index) for index in indices]
    yield source_rows(
        [_image_id(split, index) for index in indices],
        [f"shapes://{split}/{index}?seed={seed}" for index in indices],
        data,
        [None] * len(data),
        [None] * len(data),
        sizes=[len(one) for one in data],
    )
