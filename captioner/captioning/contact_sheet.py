"""A collection's captions for people to look at: a contact sheet in one HTML file, and a grid of the first pictures."""

import base64
import html
import io
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from captioner import storage
from captioner.artifacts.output import Output
from captioner.artifacts.schema import FileEntry
from captioner.artifacts.tensorboard import add_picture, event_file
from captioner.config import CaptionConfig
from captioner.errors import CaptionerError
from captioner.images.load import load_thumbnail
from captioner.plots import caption_grid
from captioner.sources import read_image

CONTACT_SHEET, GRID = "contact_sheet.html", "grid.png"
GRID_IMAGES = 16
_SIDE = 320

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
  :root {{ color-scheme: light dark }}
  body {{ margin: 1.5rem; font: 1rem/1.4 system-ui, sans-serif }}
  main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1.25rem }}
  figure {{ margin: 0; overflow-wrap: anywhere }}
  img {{ max-width: 100%; border-radius: .4rem }}
  small {{ display: block; opacity: .7 }}
  .error {{ color: light-dark(#a4161a, #ff9b9b) }}
</style>
<h1>{title}</h1>
<p>{shown} of {total} images, captioned by {model}.</p>
<main>
{figures}
</main>
</html>
"""


def write_contact_sheet(
    output: Output, files: list[FileEntry], rows: pa.Table, config: CaptionConfig
) -> None:
    """Write ``contact_sheet.html`` into ``output``: the first images by id, at most ``contact_sheet_images``.

    ``grid.png``, also written for TensorBoard, shows the first 16 of them that are pictures.

    Args:
        files: the Parquet files of the captions.
        rows: image_id of every image.
    """
    first = pc.sort_indices(rows["image_id"])[: config.contact_sheet_images]
    wanted = rows["image_id"].take(first)
    pieces = []
    for entry in files:
        with storage.open_input(output.uri(entry.path)) as handle:
            for batch in pq.ParquetFile(handle).iter_batches(4096):
                table = pa.table(batch)
                pieces.append(table.filter(pc.is_in(table["image_id"], wanted)))
    chosen = pa.concat_tables(pieces).sort_by("image_id").to_pylist()
    figures: list[str] = []
    grid: list[tuple[np.ndarray[Any, np.dtype[np.uint8]], str]] = []
    for row in chosen:
        small = _picture(row, config)
        figures.append(_figure(row, small))
        if isinstance(small, Image.Image) and len(grid) < GRID_IMAGES:
            grid.append((np.asarray(small), row["caption"]))
    page = _PAGE.format(
        title=f"Captions of {html.escape(config.images)}",
        shown=f"{len(chosen):,}",
        total=f"{len(rows):,}",
        model=html.escape(config.model),
        figures="\n".join(figures),
    )
    storage.write_bytes(output.uri(CONTACT_SHEET), page.encode())
    if grid:
        png = caption_grid([image for image, _ in grid], [caption for _, caption in grid])
        storage.write_bytes(output.uri(GRID), png)
        with event_file(output, "captions") as writer:
            add_picture(writer, "grid", png)


def _picture(row: dict[str, str | None], config: CaptionConfig) -> Image.Image | str:
    """A small picture, or why there is none."""
    if row["error"] is not None:
        return row["error"]
    try:
        return load_thumbnail(read_image(str(row["uri"])), config.limits, _SIDE)
    except CaptionerError as error:  # removed or changed since it was captioned
        return str(error)


def _figure(row: dict[str, str | None], small: Image.Image | str) -> str:
    caption = f"<small>{html.escape(str(row['image_id']))}</small>"
    text = html.escape(row["caption"] or "(no words)")
    if row["error"] is None:
        caption = f"<figcaption>{text}{caption}</figcaption>"
    if isinstance(small, str):
        return f'<figure><p class="error">{html.escape(small)}</p>{caption}</figure>'
    file = io.BytesIO()
    small.save(file, "JPEG", quality=80)
    data = base64.b64encode(file.getvalue()).decode()
    return (
        f'<figure><img loading="lazy" alt="{text}" width="{small.width}" height="{small.height}" '
        f'src="data:image/jpeg;base64,{data}">{caption}</figure>'
    )
