"""The demo, as it is run by whoever comes first."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from captioner.config import EvaluateConfig
from captioner.evaluation.pictures import choose_images
from captioner.evaluation.scenes import score_scenes

from .conftest import RunJob


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_demo_says_what_is_true_of_nine_scenes_in_ten(tmp_path: Path, run_job: RunJob) -> None:
    done = run_job("demo", "--output", str(tmp_path / "demo"))
    assert done.returncode == 0, done.stderr[-3000:]
    truth = json.loads((tmp_path / "demo/truth.json").read_text())
    assert truth["scenes"] == 200
    assert truth["right"] >= 0.9, truth
    assert f"are right in {truth['right']:.3f} of 200 scenes" in done.stdout
    report = tmp_path / "demo/report"
    rows = pq.read_table(report / "predictions.parquet").to_pylist()
    first = choose_images(
        [row["image_id"] for row in rows], EvaluateConfig.model_fields["seed"].default
    )[0]
    (shown,) = (row for row in rows if row["image_id"] == first)
    assert score_scenes([shown["caption"]], [shown["references"][0]]).right == 1.0
    # Where it looked.
    assert len(list((report / "attention").glob("*.png"))) == 4
