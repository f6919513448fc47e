"""A collection's captions for people to look at: a contact sheet in one HTML file, and a grid of the first pictures."""

import base64
import html
import io
from heapq import nsmallest
from itertools import chain
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from captioner.artifacts.collection import Tables
from captioner.artifacts.manifests import FileEntry
from captioner.artifacts.output import Output
from captioner.artifacts.tables import CAPTIONED_ROWS, THUMBNAIL
from captioner.artifacts.tensorboard import add_picture, event_file
from captioner.config import CaptionConfig
from captioner.plots import Captioned, caption_grids

_SHOWN = pa.schema(
    [*(CAPTIONED_ROWS.field(name) for name in ("image_id", "caption", "error")), THUMBNAIL]
)
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


def write_contact_sheet(output: Output, tables: Tables, config: CaptionConfig) -> list[FileEntry]:
    """Write ``contact_sheet.html`` into ``output``: the first images by id, at most ``contact_sheet_images``.

    ``grid.png``, also written for TensorBoard, shows the first 16 of them that are pictures.

    Args:
        tables: the captions, with thumbnails.

    Returns:
        what was written.
    """
    ids = pa.schema([CAPTIONED_ROWS.field("image_id")])
    found = (table["image_id"].to_pylist() for table in tables.rows(tables.entries(), ids))
    first = pa.array(
        nsmallest(config.contact_sheet_images, chain.from_iterable(found)), pa.string()
    )
    pieces = []
    for entry in tables.entries():
        (names,) = tables.rows([entry], ids)
        if pc.any(pc.is_in(names["image_id"], first)).as_py():
            # The thumbnails of the others are left where they are.
            (table,) = tables.rows([entry], _SHOWN)
            pieces.append(table.filter(pc.is_in(table["image_id"], first)))
    chosen = pa.concat_tables(pieces).sort_by("image_id").to_pylist()
    page = _PAGE.format(
        title=f"Captions of {html.escape(config.images)}",
        shown=f"{len(chosen):,}",
        total=f"{tables.manifest.counts.images:,}",
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
