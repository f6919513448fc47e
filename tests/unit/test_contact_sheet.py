"""A contact sheet is drawn from the rows of the captions alone."""

import io
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from captioner.artifacts.manifests import FileEntry
from captioner.artifacts.output import Output
from captioner.captioning.contact_sheet import write_contact_sheet
from captioner.config import CaptionConfig
from tests.captioned import tables_of
from tests.pictures import picture

ROWS = [
    {"image_id": "c.jpg", "caption": "a dog", "thumbnail": picture(0), "error": None},
    {"image_id": "b&.jpg", "caption": "", "thumbnail": picture(1, size=(30, 90)), "error": None},
    {"image_id": "a.jpg", "caption": None, "thumbnail": None, "error": "not a <picture>"},
    {"image_id": "e.jpg", "caption": "a cow", "thumbnail": picture(2), "error": None},
    {"image_id": "d.jpg", "caption": "a cat", "thumbnail": None, "error": None},
]
SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("caption", pa.string()),
        ("thumbnail", pa.binary()),
        ("error", pa.string()),
    ]
)


def write(root: Path, rows: list[dict[str, object]]) -> list[FileEntry]:
    output = Output(str(root), {"job": "caption"})
    files = []
    for number, part in enumerate((rows[:2], rows[2:])):
        file = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(part, SCHEMA), file)
        entry = output.write(f"captions/{number}.parquet", file.getvalue())
        files.append(entry.model_copy(update={"rows": len(part)}))
    config = CaptionConfig(images="photos", model="model", output="out", contact_sheet_images=4)
    with output:
        return write_contact_sheet(output, tables_of(output, files), config)


def test_the_first_images_are_shown_by_id_with_what_is_known_of_them(tmp_path: Path) -> None:
    written = write(tmp_path / "out", ROWS)
    page = (tmp_path / "out/contact_sheet.html").read_text()
    figures = re.findall(r"<figure>(.*?)</figure>", page)
    assert "4 of 5 images" in page
    assert [re.findall(r"<small>(.*?)</small>", figure)[0] for figure in figures] == [
        "a.jpg", "b&amp;.jpg", "c.jpg", "d.jpg",
    ]  # fmt: skip
    assert "not a &lt;picture&gt;" in figures[0]
    assert 'alt="(no words)" width="30" height="90"' in figures[1]
    assert 'alt="a dog" width="96" height="72" src="data:image/jpeg;base64,' in figures[2]
    assert "a cat" in figures[3]
    assert "<img" not in figures[0] + figures[3]
    assert [entry.path for entry in written] == [
        "contact_sheet.html", "grid.png", "tensorboard/events.out.tfevents.captions",
    ]  # fmt: skip
    grid = np.asarray(Image.open(tmp_path / "out/grid.png").convert("L"))
    # The one without a thumbnail is a grey field.
    assert (grid == 0xD9).sum() > 10_000


def test_without_a_picture_there_is_no_grid(tmp_path: Path) -> None:
    (sheet,) = write(tmp_path / "out", [ROWS[2]])
    assert sheet.path == "contact_sheet.html"
