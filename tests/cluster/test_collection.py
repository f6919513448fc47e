"""A captioned collection in each of its forms: Parquet, JSON lines, and a contact sheet for people."""

import html
import json
import re
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from captioner import storage
from captioner.artifacts.model_directory import NGRAMS, WEIGHTS
from captioner.artifacts.tables import CAPTIONED_ROWS
from captioner.captioning.captioner import Captioner
from captioner.captioning.collection import caption_collection
from captioner.config import CaptionConfig, DecodeConfig, DecodeOverrides
from captioner.encoders.weights import ENCODER_WEIGHTS
from captioner.errors import ModelError, SourceError, StoreError
from tests.models import write_model
from tests.pictures import picture

pytestmark = [pytest.mark.usefixtures("local_ray"), pytest.mark.timeout(900)]


# The model's own search; the job asks for a few words and a second caption besides.
OWN = DecodeConfig(beam_size=2, mbr_samples=8)
SEARCHED = OWN.model_copy(update={"num_captions": 2, "max_length": 6})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("models") / "words", decode=OWN)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number in range(7):
        (folder / f"{number}.png").write_bytes(picture(number, "PNG", (400, 200)))
    (folder / "&<b>.jpg").write_text("no picture")
    return folder


def config(photos: Path, model: str, output: Path, **changes: object) -> CaptionConfig:
    base = {
        "images": str(photos),
        "model": model,
        "output": str(output),
        "decode": DecodeOverrides(num_captions=2, max_length=6),
        "contact_sheet": True,
        "contact_sheet_images": 5,
    }
    return CaptionConfig.model_validate(base | changes)


@pytest.fixture(scope="module")
def parquet(photos: Path, model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a text file a picture besides."""
    output = tmp_path_factory.mktemp("parquet") / "captions"
    caption_collection(config(photos, model, output, format="txt"))
    return output


@pytest.fixture(scope="module")
def jsonl(photos: Path, model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stopped after its last row: the next run must make the file of rows that are there already."""
    output = tmp_path_factory.mktemp("jsonl") / "captions"
    strict = config(photos, model, output, format="jsonl", max_reject_fraction=0.0)
    with pytest.raises(SourceError, match="1 of 8 images were rejected"):
        caption_collection(strict)
    assert not (output / "manifest.json").exists()
    manifest = caption_collection(config(photos, model, output, format="jsonl"))
    tables = {entry.path: entry.rows for entry in manifest.files if entry.rows is not None}
    assert tables.pop("captions.jsonl") == sum(rows or 0 for rows in tables.values()) == 8
    assert manifest.decode == SEARCHED
    return output


@pytest.mark.parametrize("part", [WEIGHTS, NGRAMS, ENCODER_WEIGHTS])
def test_a_damaged_model_is_refused_before_the_output_is_claimed(
    photos: Path, model: str, tmp_path: Path, part: str
) -> None:
    damaged, output = tmp_path / "model", tmp_path / "captions"
    shutil.copytree(model, damaged)
    content = bytearray((damaged / part).read_bytes())
    content[-1] ^= 1
    (damaged / part).write_bytes(content)
    with pytest.raises(ModelError, match=f"{part} is damaged"):
        caption_collection(config(photos, str(damaged), output))
    assert not output.exists()


def test_json_lines_hold_what_parquet_holds(
    photos: Path, model: str, parquet: Path, jsonl: Path
) -> None:
    names = {file.path for file in storage.list_files(str(jsonl))}
    names -= {path for path in names if path.startswith("captions/")}  # what others extend
    sheet = {"contact_sheet.html", "grid.png", "tensorboard/events.out.tfevents.captions"}
    assert names == {"_job.json", "captions.jsonl", "manifest.json", "rejects.csv"} | sheet
    lines = (jsonl / "captions.jsonl").read_text().splitlines()
    rows = {row["image_id"]: row for row in map(json.loads, lines)}
    table = pq.read_table(parquet / "captions")
    # Of the pictures on a contact sheet, which a run that goes on must have, too.
    assert set(table.column_names) == {*CAPTIONED_ROWS.names, "thumbnail"}
    compared = ["size", "mtime", "sha256"]  # when a collection grows; of no use elsewhere
    expected = table.drop_columns(["thumbnail", *compared]).to_pylist()
    assert rows == {row["image_id"]: row for row in expected}
    texts = {file.stem: file.read_text() for file in (parquet / "txt").iterdir()}
    assert texts == {str(number): rows[f"{number}.png"]["caption"] + "\n" for number in range(7)}
    good = rows["3.png"]
    captioner = Captioner.load(model, device="cpu")
    found = captioner.caption([picture(3, "PNG", (400, 200))], SEARCHED)[0]
    assert (good["caption"], good["error"]) == (found.text, None)
    assert good["log_prob"] == pytest.approx(found.log_prob, abs=1e-3)
    assert rows["&<b>.jpg"]["caption"] is None
    assert "not a JPEG" in rows["&<b>.jpg"]["error"]
    with pytest.raises(StoreError, match="format"):
        caption_collection(config(photos, model, jsonl))


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_contact_sheet_is_one_file_with_the_first_pictures(
    model: str, form: str, request: pytest.FixtureRequest
) -> None:
    output: Path = request.getfixturevalue(form)
    page = (output / "contact_sheet.html").read_text()
    captioner = Captioner.load(model, device="cpu")
    pictures = re.findall(r'<img [^>]*alt="([^"]*)" width="(\d+)" height="(\d+)"', page)
    expected = [
        captioner.caption([picture(number, "PNG", (400, 200))], SEARCHED)[0].text
        for number in range(4)
    ]
    assert [html.unescape(text) for text, _, _ in pictures] == expected
    assert {(width, height) for _, width, height in pictures} == {("240", "120")}
    assert "&amp;&lt;b&gt;.jpg" in page
    assert "<b>" not in page
    assert "5 of 8 images" in page
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "<script" not in page
    # The first five are four pictures and a file that is none.
    grid = Image.open(output / "grid.png")
    assert grid.width > 1.9 * grid.height
    assert [file.name for file in (output / "tensorboard").iterdir()] == [
        "events.out.tfevents.captions"
    ]
