"""Pictures of a report: a grid of captioned images, the best and the worst of them, and where the decoder looked."""

import io
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from captioner import storage
from captioner.images.load import Fit
from captioner.plots import Captioned, attention_maps, caption_grids

logger = logging.getLogger(__name__)

GRID_IMAGES, EXTREMES = 16, 10


def choose_images(image_ids: Sequence[str], seed: int) -> list[str]:
    """The images of a report's grid, at most sixteen."""
    order = np.random.default_rng(seed).permutation(len(image_ids))
    return [image_ids[place] for place in order[:GRID_IMAGES]]


def draw_report(
    scored: pa.Table,
    chosen: Sequence[str],
    thumbnails: Callable[[Sequence[str]], dict[str, bytes]],
    *,
    fit: Fit,
) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the PNG files of a report.

    Args:
        scored: image_id, caption, references and cider of every image; words and attention of some, null of others.
        chosen: ids of the grid's images.
        thumbnails: ids -> the small pictures of those that have one.
        fit: which part of a picture the grid lies over.
    """
    order = np.argsort(-scored["cider"].to_numpy(), kind="stable")
    count = min(EXTREMES, (len(order) + 1) // 2)  # no image is in both
    extremes = {"Highest CIDEr-D": order[:count], "Lowest CIDEr-D": order[count:][::-1][:count]}
    first = pc.index_in(pa.array(chosen), scored["image_id"]).to_numpy()
    drawn = np.unique(np.concatenate([first, *extremes.values()]))
    rows = dict(zip(drawn.tolist(), scored.take(pa.array(drawn)).to_pylist(), strict=True))
    small = thumbnails([row["image_id"] for row in rows.values()])
    if missing := len(rows) - len(small):
        logger.warning("%d of the report's %d pictures are grey: no thumbnails", missing, len(rows))

    def cells(places: np.ndarray[Any, Any], note: str = "") -> list[Captioned]:
        return [
            Captioned(
                row["image_id"],
                small.get(row["image_id"]),
                row["caption"],
                row["references"],
                note.format(**row),
            )
            for row in (rows[place] for place in places.tolist())
        ]

    yield "grid.png", caption_grids({"": cells(first)})
    sections = {
        heading: cells(places, "CIDEr-D {cider:.3f}") for heading, places in extremes.items()
    }
    yield "best_and_worst.png", caption_grids(sections, columns=5)
    for number, place in enumerate(first.tolist()):
        row = rows[place]
        thumbnail = small.get(row["image_id"])
        if row["words"] and thumbnail is not None:
            with Image.open(io.BytesIO(thumbnail)) as picture:
                box = fit.box(*picture.size)
            maps = attention_maps(thumbnail, row["words"], np.array(row["attention"]), box)
            yield storage.join("attention", f"{number}.png"), maps
