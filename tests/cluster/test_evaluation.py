"""Evaluation's pass over a split: what comes back of every image, and of those that a report draws."""

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from captioner.artifacts.feature_store import FeatureStore
from captioner.artifacts.model_directory import open_model
from captioner.captioning.captioner import Captioner
from captioner.config import (
    DecodeConfig,
    DecoderConfig,
    EncoderConfig,
    EvaluateConfig,
    ExtractConfig,
    SourceConfig,
)
from captioner.decoders import build_decoder
from captioner.errors import ModelError, SourceError
from captioner.evaluation import pipeline
from captioner.evaluation.evaluate import evaluate, score_table
from captioner.evaluation.pipeline import ScoreImages, score_split
from captioner.features.extract import extract
from captioner.text import END, Vocabulary
from tests.models import encoder_of, publish_model, write_model
from tests.pictures import picture
from tests.stores import ANIMALS, write_store

pytestmark = [pytest.mark.usefixtures("local_ray"), pytest.mark.timeout(900)]

DECODE = DecodeConfig(beam_size=2, max_length=4)
WORDS = Vocabulary.build([["a", "runs", *ANIMALS]])


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    root = tmp_path_factory.mktemp("stores") / "features"
    return FeatureStore.open(write_store(root, {"validation": 9}, grid=True, uncaptioned=2))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, store: FeatureStore) -> str:
    """A transformer with fresh weights: its captions mean nothing, but it looks at the picture."""
    config = DecoderConfig(kind="transformer", width=16, heads=2, layers=1)
    torch.manual_seed(0)
    decoder = build_decoder(config, len(WORDS), store.manifest.encoder.spec.shape)
    with torch.no_grad():
        decoder.output.bias[END] -= 2  # or they would be empty
    root = tmp_path_factory.mktemp("models") / "model"
    return publish_model(root, decoder, config, WORDS, encoder=encoder_of(store), decode=DECODE)


def test_attention_comes_back_for_the_images_drawn_alone(store: FeatureStore, model: str) -> None:
    captions = store.captions("validation")
    drawn = frozenset(list(captions)[2:4])
    rows = score_split(
        store, "validation", captions, open_model(model), DECODE, drawn=drawn, batch_size=4
    ).to_pylist()
    assert [row["image_id"] for row in rows] == sorted(captions)
    assert {row["image_id"] for row in rows if row["attention"] is not None} == drawn
    words = sum(len(text.rstrip(".").split()) + 1 for texts in captions.values() for text in texts)
    assert sum(row["targets"] for row in rows) == words
    table = store.load("validation", ("grid",))
    there = [name in captions for name in table.image_ids]
    features = {"grid": torch.from_numpy(table.columns["grid"][there]).float()}
    expected = Captioner.load(model, "cpu").caption_features(features, DECODE)
    assert [row["caption"] for row in rows] == [one.text for one in expected]
    for row, one in zip(rows, expected, strict=True):
        if row["image_id"] in drawn:
            assert row["words"] == list(one.words)
            np.testing.assert_allclose(row["attention"], one.attention, atol=1e-5)


def test_a_report_is_scored_and_drawn_from_the_store_alone(
    store: FeatureStore, model: str, tmp_path: Path
) -> None:
    config = EvaluateConfig(
        features=store.uri,
        model=model,
        output=str(tmp_path / "report"),
        attention_images=2,
        meteor=False,
    )
    report = evaluate(config)
    images = len(store.captions("validation"))
    assert report.scores["images"] == images
    assert evaluate(config) == report
    pictures = ["attention/0.png", "attention/1.png", "best_and_worst.png", "grid.png"]
    found = sorted(str(path.relative_to(tmp_path / "report")) for path in tmp_path.rglob("*.png"))
    assert found == pictures
    predictions = pq.read_table(tmp_path / "report/predictions.parquet")
    assert predictions["image_id"].to_pylist() == list(store.captions("validation"))
    for name, value in report.scores["standard"].items():
        if name in ("rouge_l", "cider"):
            assert np.mean(predictions[name].to_numpy()) == pytest.approx(value, abs=1e-5)
    table = score_table(report)
    assert f"{images} images, split validation" in table
    assert "cider" in table


def test_pictures_are_scored_directly_as_their_features_are(tmp_path: Path) -> None:
    folder = tmp_path / "photographs"
    folder.mkdir()
    captions = {}
    for number in range(7):
        (folder / f"{number}.jpg").write_bytes(picture(number))
        captions[f"{number}.jpg"] = [f"A red circle {number}.", "Two green squares."]
    (folder / "3.jpg").write_bytes(picture(3)[:200])
    (folder / "9.jpg").write_bytes(picture(9))  # nobody says anything about it
    lines = [f"{name},{text}" for name, texts in captions.items() for text in texts]
    (folder / "captions.csv").write_text("\n".join(["image,caption", *lines]))
    options = SourceConfig(split="test")
    model = write_model(tmp_path / "model", "adaptive_attention")
    record = open_model(model).record.encoder
    store = str(tmp_path / "features")
    extract(
        ExtractConfig(
            source=str(folder),
            output=store,
            encoder=EncoderConfig(
                weights=f"{model}/encoder.safetensors",
                layer="layer3",
                compute=record.spec.precision,
            ),
            source_options=options,
            grid=True,
            max_reject_fraction=0.5,
        )
    )
    asked: dict[str, Any] = {"model": model, "split": "test", "meteor": False, "batch_size": 3}
    stored = evaluate(EvaluateConfig(features=store, output=str(tmp_path / "stored"), **asked))
    config = EvaluateConfig(
        source=str(folder),
        source_options=options,
        output=str(tmp_path / "direct"),
        max_reject_fraction=0.5,
        **asked,
    )
    direct = evaluate(config)
    assert direct.scores["images"] == 6
    assert stored.scores["in_train"] == 0
    assert direct.scores["in_train"] is None
    for name in ("loss", "accuracy"):
        assert direct.scores[name] == pytest.approx(stored.scores[name], rel=1e-3)
    tables = [pq.read_table(f"{report.uri}/predictions.parquet") for report in (stored, direct)]
    assert tables[0].select(["image_id", "caption"]) == tables[1].select(["image_id", "caption"])
    for name in ("grid.png", "attention/0.png", "rejects.csv"):
        assert (tmp_path / "direct" / name).exists()
    assert not (tmp_path / "direct/_work").exists()
    assert evaluate(config) == direct  # which is complete
    few = {"max_reject_fraction": 0.1, "output": str(tmp_path / "few")}
    with pytest.raises(SourceError, match="1 of 7 images were rejected"):
        evaluate(config.model_copy(update=few))
    with pytest.raises(SourceError, match="no captions in split 'train'; it has .* test .14"):
        evaluate(config.model_copy(update={"split": "train"}))


def test_features_of_another_encoder_are_refused_with_the_command_that_would_do(
    store: FeatureStore, tmp_path: Path
) -> None:
    other = write_model(tmp_path / "model", "adaptive_attention")
    config = EvaluateConfig(features=store.uri, model=other, output=str(tmp_path / "report"))
    with pytest.raises(ModelError, match="encoder.weights_sha256: .* evaluate --source memory://"):
        evaluate(config)
    assert not (tmp_path / "report").exists()


class _Counted(ScoreImages):
    """Notes how many images each actor gets. None begins before all are there."""

    actors = 2

    def __init__(self, *args: Any, folder: Path, **options: Any):
        super().__init__(*args, **options)
        self.file = folder / str(os.getpid())
        self.file.touch()
        until = time.monotonic() + 120
        while len(list(folder.iterdir())) < self.actors and time.monotonic() < until:
            time.sleep(0.05)

    def __call__(self, batch: dict[str, Any]) -> pa.Table:
        images = len(batch["image_id"])
        time.sleep(0.01 * images)
        self.file.write_text(str(int(self.file.read_text() or 0) + images))
        return super().__call__(batch)


def test_actors_get_the_same_share_of_a_split(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FeatureStore.open(write_store(tmp_path / "store", {"validation": 300}, grid=True))
    shares = tmp_path / "shares"
    shares.mkdir()

    class Counted(_Counted):
        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, folder=shares, **options)

    monkeypatch.setattr(pipeline, "ScoreImages", Counted)
    captions = store.captions("validation")
    rows = pipeline.score_split(
        store,
        "validation",
        captions,
        open_model(model),
        DECODE,
        drawn=frozenset(),
        batch_size=200,
    )
    assert len(rows) == 300
    done = [int(file.read_text()) for file in shares.iterdir()]
    assert len(done) == _Counted.actors
    assert min(done) > 0.8 * max(done), done
