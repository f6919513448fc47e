"""What tests of finetuning share: a small model of generated scenes whose network knows nothing yet."""

from pathlib import Path

import numpy as np
import safetensors.torch
import torch

from captioner.artifacts.manifests import EncoderRecord
from captioner.config import (
    DecodeConfig,
    DecoderConfig,
    DecoderKind,
    EncoderConfig,
    ShapesConfig,
    SourceConfig,
)
from captioner.decoders import build_decoder
from captioner.encoders.encoder import Encoder
from captioner.encoders.family import family_of
from captioner.images.load import load_image
from captioner.sources import open_source
from captioner.sources.captioned import captioned
from captioner.sources.scenes import draw_scene
from captioner.text import Vocabulary, clean
from tests.models import publish_model

SIDE = 64


def write_fresh_model(
    root: Path,
    shapes: ShapesConfig,
    *,
    encoder: str = "timm:test_convnext",
    kind: DecoderKind = "adaptive_attention",
) -> str:
    """Decoder and encoder with random weights, without dropout; the vocabulary is that of the scenes."""
    config = EncoderConfig(name=encoder, weights="random", input_size=SIDE)
    family, _ = family_of(config.name)
    tensors, _ = family.weights(config)
    spec = family.spec(config, tensors, "float32")
    source = open_source("shapes", SourceConfig(shapes=shapes))
    _, captions = captioned(source, ("train",))
    words = (clean(one, "standard") for texts in captions["train"].values() for one in texts)
    vocabulary = Vocabulary.build(words)
    settings = DecoderConfig(kind=kind, width=32, heads=2, dropout=0.0, feature_dropout=0.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        decoder = build_decoder(settings, len(vocabulary), spec.shape)
    scenes = [draw_scene(shapes.seed, "train", number) for number in range(8)]
    pixels = np.stack([load_image(data, spec.fit).pixels for data in scenes])
    pooled, cells = Encoder(spec, tensors)(pixels, grid=True)
    assert cells is not None
    seen = cells.float().flatten(0, 1) if "grid" in decoder.columns else pooled
    decoder.standardize.fit(seen.mean(dim=0), seen.std(dim=0))
    return publish_model(
        root,
        decoder,
        settings,
        vocabulary,
        encoder=(EncoderRecord(spec=spec, weights="random"), safetensors.torch.save(tensors)),
        decode=DecodeConfig(beam_size=2, max_length=12),
        ngrams=None,
    )
