"""A contact sheet: pictures with their captions in one HTML file that needs nothing else."""

import base64
import html
import io

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from captioner import storage
from captioner.config import CaptionConfig
from captioner.errors import CaptionerError
from captioner.images import decode_thumbnail
from captioner.schema import FileEntry
from captioner.sources import read_image

CONTACT_SHEET = "contact_sheet.html"
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
    output: storage.Output, files: list[FileEntry], rows: pa.Table, config: CaptionConfig
) -> None:
    """Write ``contact_sheet.html`` into ``output``: the first images by id, at most ``contact_sheet_images``.

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
    page = _PAGE.format(
        title=f"Captions of {html.escape(config.images)}",
        shown=f"{len(chosen):,}",
        total=f"{len(rows):,}",
        model=html.escape(config.model),
        figures="\n".join(_figure(row, config) for row in chosen),
    )
    storage.write_bytes(output.uri(CONTACT_SHEET), page.encode())


def _figure(row: dict[str, str | None], config: CaptionConfig) -> str:
    name = f"<small>{html.escape(str(row['image_id']))}</small>"
    if row["error"] is not None:
        return f'<figure><p class="error">{html.escape(row["error"])}</p>{name}</figure>'
    text = html.escape(row["caption"] or "(no words)")
    caption = f"<figcaption>{text}{name}</figcaption>"
    try:
        small = decode_thumbnail(read_image(str(row["uri"])), config.limits, _SIDE)
    except CaptionerError as error:  # removed or changed since it was captioned
        return f'<figure><p class="error">{html.escape(str(error))}</p>{caption}</figure>'
    file = io.BytesIO()
    small.save(file, "JPEG", quality=80)
    data = base64.b64encode(file.getvalue()).decode()
    return (
        f'<figure><img loading="lazy" alt="{text}" width="{small.width}" height="{small.height}" '
        f'src="data:image/jpeg;base64,{data}">{caption}</figure>'
    )
