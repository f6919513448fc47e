"""A collection's captions for people to look at: a contact sheet in one HTML file, and a grid of the first pictures."""

import base64
import html
import io
from collections.abc import Iterator
from heapq import nsmallest
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from captioner import storage
from captioner.artifacts.manifests import FileEntry
from captioner.artifacts.output import Output
from captioner.artifacts.tensorboard import add_picture, event_file
from captioner.config import CaptionConfig
from captioner.plots import Captioned, caption_grids

CONTACT_SHEET, GRID = "contact_sheet.html", "grid.png"
GRID_IMAGES = 16

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
    output: Output, files: list[FileEntry], config: CaptionConfig
) -> list[FileEntry]:
    """Write ``contact_sheet.html`` into ``output``: the first images by id, at most ``contact_sheet_images``.

    ``grid.png``, also written for TensorBoard, shows the first 16 of them that are pictures.

    Args:
        files: the Parquet files of the captions, with thumbnails.

    Returns:
        what was written.
    """
    first = pa.array(nsmallest(config.contact_sheet_images, _ids(output, files)), pa.string())
    pieces = []
    for entry in files:
        with storage.open_input(output.uri(entry.path)) as handle:
            file = pq.ParquetFile(handle)
            there = pc.is_in(file.read(["image_id"])["image_id"], first)
            if pc.any(there).as_py():  # the thumbnails of the others are left where they are
                pieces.append(file.read().filter(there))
    chosen = pa.concat_tables(pieces).sort_by("image_id").to_pylist()
    page = _PAGE.format(
        title=f"Captions of {html.escape(config.images)}",
        shown=f"{len(chosen):,}",
        total=f"{sum(entry.rows or 0 for entry in files):,}",
        model=html.escape(config.model),
        figures="\n".join(map(_figure, chosen)),
    )
    written = [output.write(CONTACT_SHEET, page.encode())]
    grid = [
        Captioned(row["image_id"], row["thumbnail"], row["caption"])
        for row in chosen
        if row["error"] is None
    ]
    if grid:
        png = caption_grids({"": grid[:GRID_IMAGES]})
        written.append(output.write(GRID, png))
        with event_file(output, "captions", written) as writer:
            add_picture(writer, "grid", png)
    return written


def _ids(output: Output, files: list[FileEntry]) -> Iterator[str]:
    for entry in files:
        with storage.open_input(output.uri(entry.path)) as handle:
            yield from pq.read_table(handle, columns=["image_id"])["image_id"].to_pylist()


def _figure(row: dict[str, Any]) -> str:
    caption = f"<small>{html.escape(row['image_id'])}</small>"
    if row["error"] is not None:
        return f'<figure><p class="error">{html.escape(row["error"])}</p>{caption}</figure>'
    text = html.escape(row["caption"] or "(no words)")
    picture = ""
    if row["thumbnail"] is not None:
        width, height = Image.open(io.BytesIO(row["thumbnail"])).size
        data = base64.b64encode(row["thumbnail"]).decode()
        picture = (
            f'<img loading="lazy" alt="{text}" width="{width}" height="{height}" '
            f'src="data:image/jpeg;base64,{data}">'
        )
    return f"<figure>{picture}<figcaption>{text}{caption}</figcaption></figure>"
