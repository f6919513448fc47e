"""The pictures and statistics of a report, drawn from a real model directory."""

import io
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from captioner.artifacts.feature_store import ENCODER_WEIGHTS, FeatureStore
from captioner.artifacts.model_directory import ModelManifest, pack_weights, save_model
from captioner.artifacts.output import Output
from captioner.artifacts.schema import SourceIdentity, SplitCounts, StoreManifest
from captioner.captioning.captioner import Captioner
from captioner.config import DecodeConfig, DecoderConfig, EncoderConfig, TextConfig
from captioner.decoders import build_decoder
from captioner.decoding.cider import NGramFrequencies
from captioner.encoders.resnet50 import identify, load_weights
from captioner.encoders.spec import FeatureShape
from captioner.evaluation.evaluate import caption_statistics
from captioner.evaluation.pictures import draw_report
from captioner.text import Vocabulary

CAPTIONS = ["a dog runs", "two men on a hill", "a red ball"]


@pytest.fixture(scope="module")
def captioner(tmp_path_factory: pytest.TempPathFactory) -> Captioner:
    """A transformer with fresh weights, so its captions mean nothing, but it looks at the picture."""
    root = tmp_path_factory.mktemp("model")
    encoder = EncoderConfig(weights="random", layer="layer3")
    tensors = load_weights(encoder)
    (root / "store").mkdir()
    safetensors.torch.save_file(tensors, root / "store" / ENCODER_WEIGHTS)
    manifest = StoreManifest(
        encoder=identify(encoder, tensors, "float32"),
        source=SourceIdentity(kind="test", uri="memory://"),
        grid=True,
        total=SplitCounts(images=0, ok=0, rejected=0, captions=0),
        splits={},
        files=[],
    )
    vocabulary = Vocabulary.build([text.split() for text in CAPTIONS])
    decoder = DecoderConfig(kind="transformer", width=16, heads=2, layers=1)
    torch.manual_seed(0)
    weights = pack_weights(build_decoder(decoder, len(vocabulary), FeatureShape(1024, 1024, 7, 7)))
    output = Output(str(root / "model"), {"job": "train"})
    with output:
        record = save_model(
            output,
            weights=weights,
            vocabulary=vocabulary,
            ngrams=NGramFrequencies(images=2, counts={(5,): 2}),
            decoder=decoder,
            text=TextConfig(),
            decode=DecodeConfig(beam_size=4, num_captions=3, max_length=5),
            store=FeatureStore(str(root / "store"), manifest),
            training={},
        )
        published = ModelManifest(weights_sha256=record.weights_sha256, files=[])
        output.publish(published.model_dump_json())
    return Captioner.load(output.root, "cpu")


def test_a_report_has_a_grid_extremes_and_attention(captioner: Captioner, tmp_path: Path) -> None:
    uris = []
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 255, (40, 60, 3), np.uint8)
        uris.append(str(tmp_path / f"{number}.png"))
        Image.fromarray(pixels).save(uris[-1])
    drawn = dict(
        draw_report(
            uris,
            CAPTIONS,
            [[text] for text in CAPTIONS],
            [0.1, 2.0, 1.0],
            captioner,
            DecodeConfig(beam_size=2, max_length=4),
            attention_images=2,
            seed=0,
        )
    )
    names = {"grid.png", "best_and_worst.png", "attention/0.png", "attention/1.png"}
    assert set(drawn) == names
    for picture in drawn.values():
        image = Image.open(io.BytesIO(picture))
        assert min(image.size) > 100
        assert len(image.convert("RGB").getcolors(2**24) or []) > 100


def test_a_report_goes_without_photographs_that_are_gone(
    captioner: Captioner, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "0.png")
    uris = [str(tmp_path / f"{number}.png") for number in range(3)]
    references = [[text] for text in CAPTIONS]
    scores = [0.1, 2.0, 1.0]
    with caplog.at_level("WARNING"):
        drawn = dict(
            draw_report(
                uris,
                CAPTIONS,
                references,
                scores,
                captioner,
                DecodeConfig(beam_size=2, max_length=4),
                attention_images=3,
                seed=0,
            )
        )
    assert len([name for name in drawn if name.startswith("attention/")]) == 1
    assert {"grid.png", "best_and_worst.png"} < set(drawn)
    assert "2 of the report's photographs are grey" in caplog.text


def test_a_model_is_searched_as_it_was_trained_to_be(captioner: Captioner) -> None:
    pixels = np.random.default_rng(5).integers(0, 255, (1, 224, 224, 3), np.uint8)
    (own,) = captioner.caption_pixels(pixels)
    (asked,) = captioner.caption_pixels(pixels, captioner.model.record.decode)
    assert [one.text for one in own.candidates] == [one.text for one in asked.candidates]
    assert len(own.candidates) == 3


def test_statistics_count_words_and_lengths() -> None:
    found = caption_statistics([["A dog runs.", "Two dogs!"], ["A dog, runs"]], ["a dog", "a dog"])
    assert found["captions"] == {
        "captions": 2,
        "distinct_captions": 1,
        "vocabulary": 2,
        "mean_length": 2.0,
        "longest": 2,
        "lengths": {"2": 2},
    }
    assert found["references"]["distinct_captions"] == 2
    assert found["references"]["vocabulary"] == 5
    assert found["references"]["lengths"] == {"2": 1, "3": 2}
