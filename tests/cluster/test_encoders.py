"""Backbones of timm on the whole road: extracted, trained on, evaluated, captioned and served, whatever their grid."""

import asyncio
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from captioner.artifacts.feature_store import FeatureStore
from captioner.captioning.captioner import Captioner
from captioner.captioning.collection import caption_collection
from captioner.config import (
    CaptionConfig,
    DecodeConfig,
    DecoderConfig,
    EncoderConfig,
    EvaluateConfig,
    ExtractConfig,
    ShapesConfig,
    SourceConfig,
    TrainConfig,
)
from captioner.config.serving import ReplicaSettings
from captioner.evaluation.evaluate import evaluate
from captioner.features.extract import extract
from captioner.serving.messages import CaptionResponse
from captioner.serving.replica import CaptionModel
from captioner.sources.scenes import draw_scene
from captioner.training.run import run_training

pytestmark = [pytest.mark.usefixtures("local_ray"), pytest.mark.timeout(900)]

SHAPES = SourceConfig(shapes=ShapesConfig(train=16, validation=6, test=2))


@pytest.mark.parametrize(
    ("name", "kind", "grid"),
    [
        pytest.param("resnet18", "spatial_attention", (7, 7), marks=pytest.mark.long),
        pytest.param("convnext_atto", "adaptive_attention", (7, 7), marks=pytest.mark.long),
        ("vit_tiny_patch16_224", "transformer", (14, 14)),
    ],
)
def test_any_backbone_goes_the_whole_road(
    tmp_path: Path, name: str, kind: str, grid: tuple[int, int]
) -> None:
    features, model, report, captions = (
        str(tmp_path / part) for part in ("features", "model", "report", "captions")
    )
    stored = extract(
        ExtractConfig(
            source="shapes",
            output=features,
            source_options=SHAPES,
            encoder=EncoderConfig(name=f"timm:{name}", weights="random"),
            grid=True,
            batch_size=8,
        )
    )
    spec = stored.encoder.spec
    assert (spec.family, spec.grid) == ("timm", grid)
    assert spec.name.startswith(name)
    run_training(
        TrainConfig(
            features=features,
            output=model,
            decoder=DecoderConfig(
                kind=kind, width=16, heads=2, layers=1, picture_layers=1, attention_width=8
            ),
            epochs=1,
            decode=DecodeConfig(beam_size=2, max_length=6),
        )
    )
    found = evaluate(
        EvaluateConfig(
            features=features, model=model, output=report, split="validation", meteor=False
        )
    )
    assert found.scores["images"] == 6
    assert (tmp_path / "report" / "grid.png").exists()
    manifest = caption_collection(
        CaptionConfig(images="shapes", source_options=SHAPES, model=model, output=captions)
    )
    assert manifest.counts.ok == 24
    rows = pq.read_table(tmp_path / "captions" / "captions").to_pylist()
    written = {row["image_id"]: row["caption"] for row in rows}
    # The jobs, and a picture that comes on its own, give the same features and captions.
    captioner = Captioner.load(model, "cpu")
    data = draw_scene(0, "validation", 0)
    (alone,) = captioner.caption([data])
    assert alone.text == written["validation-000000"]
    assert alone.attention is not None
    assert alone.attention.shape[1:] == grid
    np.testing.assert_allclose(alone.attention.sum(axis=(1, 2)), 1, atol=1e-4)
    served = asyncio.run(serve(model, data, captioner.model.record.decode))
    assert isinstance(served, CaptionResponse)
    assert served.captions[0].caption == alone.text
    assert served.captions[0].attention is not None
    assert np.shape(served.captions[0].attention[0].weights) == grid
    assert FeatureStore.open(features).load("validation", ("grid",)).columns["grid"].shape == (
        6,
        grid[0] * grid[1],
        spec.grid_channels,
    )


async def serve(model: str, data: bytes, decode: DecodeConfig) -> object:
    """The last of what a replica says of a picture."""
    replica = CaptionModel("model", model, ReplicaSettings(max_batch_size=2, threads=1), 2**24)
    return [one async for one in replica.caption([data], [None], decode, True, 120.0)][-1]
