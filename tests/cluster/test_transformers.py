"""Captioning models of ``transformers`` on the jobs' road: captions, their continuation and growth, scores."""

import csv
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from captioner.artifacts.models import open_any
from captioner.captioning.captioner import Captioner
from captioner.captioning.collection import caption_collection
from captioner.config import (
    CaptionConfig,
    DecodeConfig,
    DecodeOverrides,
    EvaluateConfig,
    SourceConfig,
)
from captioner.errors import StoreError
from captioner.evaluation.evaluate import evaluate, score_table
from tests.pictures import picture
from tests.transformers_models import write_blip, write_chat

pytestmark = [pytest.mark.usefixtures("local_ray"), pytest.mark.timeout(900)]

SIZES = [(300, 90), (64, 64), (90, 300), (500, 400), (900, 100), (40, 33)]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number, size in enumerate(SIZES):
        (folder / f"{number}.png").write_bytes(picture(number, "PNG", size))
    (folder / "bad.jpg").write_text("no picture")
    return folder


def test_captions_are_the_models_and_grow_with_it_alone(photos: Path, tmp_path: Path) -> None:
    model, asked = (
        write_chat(tmp_path / "chat"),
        DecodeOverrides(prompt="what is there ?", beam_size=2, num_captions=2, max_length=8),
    )
    config = CaptionConfig(
        images=str(photos),
        model=model,
        output=str(tmp_path / "first"),
        decode=asked,
        format="txt",
        contact_sheet=True,
        batch_size=3,
    )
    manifest = caption_collection(config)
    assert manifest.version == open_any(model).version
    assert manifest.decode.prompt == "what is there ?"
    rows = {row["image_id"]: row for row in pq.read_table(tmp_path / "first/captions").to_pylist()}
    captioner = Captioner.load(model, "cpu")
    expected = captioner.caption([photos / f"{number}.png" for number in range(6)], manifest.decode)
    for number, caption in enumerate(expected):
        row = rows[f"{number}.png"]
        assert row["caption"] == caption.text
        assert row["log_prob"] == pytest.approx(caption.log_prob, abs=1e-3)
        assert [one["caption"] for one in row["alternatives"]] == [
            one.text for one in caption.alternatives
        ]
        assert (tmp_path / f"first/txt/{number}.txt").read_text() == caption.text + "\n"
    assert rows["bad.jpg"]["caption"] is None
    (photos / "new.png").write_bytes(picture(9, "PNG", (200, 200)))
    grown = {"extends": config.output, "output": str(tmp_path / "second"), "format": "parquet"}
    for change, said in (
        ({"model": write_chat(tmp_path / "other", 1)}, "model"),
        ({"decode": asked.model_copy(update={"prompt": "two ?"})}, "prompt"),
    ):
        with pytest.raises(StoreError, match=f"was captioned otherwise: .*{said}"):
            caption_collection(config.model_copy(update=grown | change))
    counts = caption_collection(config.model_copy(update=grown)).counts
    assert (counts.ok, counts.rejected) == (7, 1)


def test_scores_are_those_of_any_model(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, size in enumerate(SIZES):
        (folder / f"{number}.png").write_bytes(picture(number, "PNG", size))
    with (folder / "captions.csv").open("w") as file:
        rows = [(f"{number}.png", "a dog runs on grass") for number in range(len(SIZES))]
        csv.writer(file).writerows([("image", "caption"), *rows])
    model = write_blip(tmp_path / "blip")
    config = EvaluateConfig(
        source=str(folder),
        source_options=SourceConfig(split="test"),
        model=model,
        output=str(tmp_path / "report"),
        split="test",
        meteor=False,
        decode=DecodeOverrides(beam_size=2, max_length=6),
    )
    report = evaluate(config)
    assert report.scores["images"] == len(SIZES)
    assert report.scores["loss"] is None
    assert report.scores["standard"]["cider"] >= 0
    assert "cider" in score_table(report)
    found = pq.read_table(tmp_path / "report/predictions.parquet").to_pylist()
    decode = DecodeConfig(**report.scores["decode"])
    (alone,) = Captioner.load(model, "cpu").caption([folder / "0.png"], decode)
    assert found[0]["caption"] == alone.text
    manifest = json.loads((tmp_path / "report/manifest.json").read_text())
    assert manifest["model"] == model
