"""Pictures of a source in any order, as training wants them: a task reads some by their ids, and loads them."""

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import pyarrow as pa
import ray

from captioner.artifacts.id_set import AllBut
from captioner.artifacts.tables import RETRYABLE, SOURCE_ROWS
from captioner.errors import OutOfReachError, SourceError
from captioner.features.loading import load_rows
from captioner.features.stage import PIXELS, LoadPictures, tensor
from captioner.images.views import view_of_epoch
from captioner.sources.base import Source


def read_picked(
    source: "Source | ray.ObjectRef[Source]", image_ids: Sequence[str], retry_seconds: float
) -> Iterator[pa.Table]:
    """``tables.SOURCE_ROWS`` of some images, in their order, as one table."""
    there = _fetched(source) if isinstance(source, ray.ObjectRef) else source
    pieces = there.images(AllBut(image_ids), retry_seconds=retry_seconds).pieces
    rows = pa.concat_tables(table for piece in pieces for table in piece.read())
    place = {name: row for row, name in enumerate(rows["image_id"].to_pylist())}
    yield rows.take([place[name] for name in image_ids]).cast(SOURCE_ROWS)


@lru_cache(1)
def _fetched(source: "ray.ObjectRef[Source]") -> Source:
    """The source that this process read from before, mostly."""
    found: Source = ray.get(source)
    return found


def load_views(
    rows: pa.Table,
    stage: LoadPictures,
    *,
    seed: int,
    epoch: int | None,
    crop: bool,
    mirror: bool,
) -> pa.Table:
    """Pictures as an epoch shows them: ``image_id`` and ``pixels``.

    Args:
        rows: ``tables.SOURCE_ROWS``.
        epoch: None for the pictures themselves.

    Raises:
        OutOfReachError: one cannot be read now.
        SourceError: one that could be loaded can be loaded no longer.
    """
    loaded = load_rows(rows, stage)
    for name, error, kind in zip(
        *(loaded[column].to_pylist() for column in ("image_id", "error", "error_kind")), strict=True
    ):
        if error is not None:
            message = f"{name} could be loaded when the run began: {error}; without it: --restart"
            raise (OutOfReachError if kind == RETRYABLE else SourceError)(message)
    pixels = tensor(loaded, PIXELS)
    if epoch is not None and (crop or mirror):
        names = loaded["image_id"].to_pylist()
        views = [
            view_of_epoch(one, name, seed=seed, epoch=epoch, crop=crop, mirror=mirror)
            for one, name in zip(pixels, names, strict=True)
        ]
        pixels = np.stack(views)
    column = pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(pixels))
    return pa.table({"image_id": loaded["image_id"], PIXELS: column})
