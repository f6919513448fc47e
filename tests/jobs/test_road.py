"""The whole road as its users walk it: every job as a child process and through ``ray job submit``."""

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from captioner.artifacts.feature_store import FeatureStore
from captioner.artifacts.verify import verify
from captioner.captioning.captioner import Captioner
from captioner.config import DecodeConfig, SearchConfig
from captioner.errors import ImageError
from captioner.features.likeness import find_alike
from captioner.images.load import load_image
from captioner.sources.scenes import draw_scene
from tests import odd
from tests.said import by_submission, unexpected

from .conftest import RunJob

# The first test waits for the head and for four jobs.
pytestmark = pytest.mark.timeout(1200)

SHAPES = [
    "--source-options.shapes.train", "120", "--source-options.shapes.validation", "16",
    "--source-options.shapes.test", "16",
]  # fmt: skip


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory, submit_job: RunJob) -> Path:
    """Features, model, report and captions of a tiny run, each made by a submitted job, in a place with an odd name."""
    root = tmp_path_factory.mktemp("road") / odd.NAME
    steps = [
        ("extract_features", "--source", "shapes", "--output", f"{root}/features", *SHAPES,
         "--encoder.weights", "random", "--encoder.layer", "layer3", "--grid"),
        ("train", "--features", f"{root}/features", "--output", f"{root}/model",
         "--decoder.kind", "merge", "--decoder.width", "64", "--epochs", "6", "--num-workers", "2"),
        ("evaluate", "--features", (root / "features").as_uri(), "--model", f"{root}/model",
         "--split", "validation", "--output", f"{root}/report", "--decode.beam-size", "3"),
    ]  # fmt: skip
    said = root.with_name("said")
    said.mkdir()
    for name, *arguments in steps:
        done = submit_job(name, *arguments)
        assert done.returncode == 0, f"{name}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        (said / name).write_text(by_submission(done.stdout))
    folder = root / "photos" / "deep"
    folder.mkdir(parents=True)
    for index in range(5):
        (folder / f"{index}.png").write_bytes(draw_scene(0, "test", index))
    (folder / "notes.jpg").write_text("not a picture")
    done = submit_job(
        "caption",
        "--images",
        str(root / "photos"),
        "--model",
        f"{root}/model",
        "--output",
        f"{root}/captions",
    )
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    (said / "caption").write_text(by_submission(done.stdout))
    return root


@pytest.mark.parametrize("job", ["extract_features", "train", "evaluate", "caption"])
def test_a_job_says_its_own_lines_and_nothing_else(road: Path, job: str) -> None:
    assert unexpected(job, (road.with_name("said") / job).read_text(), str(road)) == []


def test_store_holds_every_image_once(road: Path) -> None:
    manifest = json.loads((road / "features/manifest.json").read_text())
    assert manifest["counts"] == {"ok": 152, "rejected": 0, "unreadable": 0, "left_out": {}}
    assert sum(split["captions"] for split in manifest["splits"].values()) == 760
    rows = pq.read_table(road / "features/features")
    assert sorted(rows["image_id"].to_pylist()) == sorted(set(rows["image_id"].to_pylist()))
    assert len(rows) == 152
    assert not (road / "features/_work").exists()


@pytest.mark.parametrize("part", ["features", "model", "report", "captions"])
def test_what_jobs_publish_is_sound(road: Path, part: str) -> None:
    found = verify(str(road / part))
    assert found.problems == []
    assert found.files >= 1


def test_a_picture_of_the_store_is_most_like_itself(road: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(draw_scene(0, "validation", 3))
    config = SearchConfig(
        features=f"{road}/features", image=f"{tmp_path}/a.png", output=f"{tmp_path}/found", k=5
    )
    found = find_alike(config).rows
    assert found["image_id"][0].as_py() == "validation-000003"
    assert found["cosine"][0].as_py() == pytest.approx(1, abs=1e-4)
    assert found["cosine"].to_pylist() == sorted(found["cosine"].to_pylist(), reverse=True)
    assert verify(f"{tmp_path}/found").problems == []
    assert find_alike(config).rows.equals(found)
    with Image.open(tmp_path / "found/grid.png") as sheet:
        assert min(sheet.size) > 200
    other = {"image": f"{tmp_path}/found/neighbours.parquet", "output": f"{tmp_path}/other"}
    with pytest.raises(ImageError, match="found/neighbours.parquet: "):
        find_alike(config.model_copy(update=other))


def test_scores_have_the_promised_form(road: Path) -> None:
    scores = json.loads((road / "report/scores.json").read_text())
    bleu = {"bleu_1", "bleu_2", "bleu_3", "bleu_4"}
    assert bleu | {"rouge_l", "cider"} <= scores["standard"].keys()
    assert scores["notebook"].keys() == bleu
    assert scores["images"] == 16
    assert 0 < scores["loss"] < 8
    assert 0 < scores["accuracy"] < 1


def test_predictions_carry_captions_probabilities_and_references(road: Path) -> None:
    rows = pq.read_table(road / "report/predictions.parquet")
    assert {"image_id", "caption", "log_prob", "references"} <= set(rows.column_names)
    assert len(rows) == 16
    assert all(len(references) == 5 for references in rows["references"].to_pylist())
    assert all(value < 0 for value in rows["log_prob"].to_pylist())


def test_report_picture_is_a_picture(road: Path) -> None:
    with Image.open(road / "report/grid.png") as picture:
        assert min(picture.size) > 300


def test_report_is_in_tensorboard_with_its_pictures(road: Path) -> None:
    events = EventAccumulator(str(road / "report/tensorboard"))
    events.Reload()
    assert {"grid", "best_and_worst"} <= set(events.Tags()["images"])
    (picture,) = events.Images("grid")
    with Image.open(road / "report/grid.png") as drawn:
        assert (picture.width, picture.height) == drawn.size
    scores = json.loads((road / "report/scores.json").read_text())
    (cider,) = events.Scalars("standard/cider")
    assert cider.value == pytest.approx(scores["standard"]["cider"])


def test_captions_cover_good_images_and_name_the_bad_one(road: Path) -> None:
    rows = pq.read_table(road / "captions/captions").to_pylist()
    assert len(rows) == 6
    bad = [row for row in rows if row["error"] is not None]
    assert [row["image_id"] for row in bad] == ["deep/notes.jpg"]
    assert bad[0]["caption"] is None
    good = [row for row in rows if row["error"] is None]
    assert all(row["caption"] is not None and row["log_prob"] < 0 for row in good)


def test_captioner_gives_the_same_vector_and_caption_as_the_jobs(road: Path) -> None:
    store = FeatureStore.open(str(road / "features"))
    captioner = Captioner.load(str(road / "model"), device="cpu")
    predictions = pq.read_table(road / "report/predictions.parquet").to_pylist()
    expected = {row["image_id"]: row["caption"] for row in predictions}
    table = store.load("validation", ("pooled", "grid"))
    fit = captioner.model.record.encoder.spec.fit
    for position, name in enumerate(table.image_ids[:4]):
        data = draw_scene(0, "validation", position)
        pixels = load_image(data, fit).pixels
        pooled, grid = captioner.encoder(pixels[np.newaxis], grid=True)
        np.testing.assert_array_equal(pooled[0].numpy(), table.columns["pooled"][position])
        assert grid is not None
        np.testing.assert_array_equal(grid[0].numpy(), table.columns["grid"][position])
        assert captioner.caption([data], DecodeConfig(beam_size=3))[0].text == expected[name]


def test_finished_store_is_left_alone_and_another_is_refused(road: Path, run_job: RunJob) -> None:
    before = {file: file.stat().st_mtime_ns for file in (road / "features").rglob("*")}
    arguments = ["--source", "shapes", "--output", f"{road}/features", *SHAPES,
                 "--encoder.weights", "random", "--encoder.layer", "layer3"]  # fmt: skip
    again = run_job("extract_features", *arguments, "--grid")
    assert again.returncode == 0, again.stderr
    assert "is complete" in again.stderr
    other = run_job("extract_features", *arguments)
    assert other.returncode == 2
    assert "grid: True there, False asked" in other.stderr
    assert before == {file: file.stat().st_mtime_ns for file in (road / "features").rglob("*")}


@pytest.mark.parametrize(
    ("arguments", "rates"),
    [
        (["extract", "--source", "shapes", "--source-options.shapes.train", "100", "--grid",
          "--images", "200", "--seconds", "1", "--batch-size", "16", "--encoder.layer", "layer3"],
         ["load_only", "model_only", "limit", "pipeline", "ratio"]),
        (["train", "--features", "{road}/features", "--decoders", "merge", "--decoder.width", "32",
          "--workers", "1", "--steps", "5", "--global-batch", "32"], ["rates"]),
        # The folder holds a file that is no picture.
        (["serve", "--model", "{road}/model", "--images", "{road}/photos", "--seconds", "1",
          "--concurrency", "1", "2"], ["limit", "best", "ratio"]),
        (["scores", "--report", "{road}/report", "--name", "tiny"], ["figures"]),
    ],
    ids=["extract", "train", "serve", "scores"],
)  # fmt: skip
def test_benchmarks_measure_what_runs(
    road: Path, run_job: RunJob, tmp_path: Path, arguments: list[str], rates: list[str]
) -> None:
    found = tmp_path / "found.json"
    rest = [text.format(road=road) for text in arguments]
    done = run_job("benchmark", *rest, "--json", str(found), "--csv", str(tmp_path / "found.csv"))
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    written = json.loads(found.read_text())
    assert all(written[rate] for rate in rates)
    with (tmp_path / "found.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows
    assert all(row["command"].startswith(f"python -m ray_jobs.benchmark {rest[0]}") for row in rows)
