"""Tiny published models with untrained weights, for tests of what loads and serves them."""

from pathlib import Path

import numpy as np
import safetensors.torch
import torch

from captioner import storage
from captioner.artifacts.feature_store import ENCODER_WEIGHTS, FeatureStore
from captioner.artifacts.model_directory import ModelManifest, pack_weights, save_model
from captioner.artifacts.output import Output
from captioner.artifacts.schema import SourceIdentity, SplitCounts, StoreManifest
from captioner.config import DecodeConfig, DecoderConfig, DecoderKind, EncoderConfig, TextConfig
from captioner.decoders import build_decoder
from captioner.decoding.cider import NGramFrequencies
from captioner.encoders.resnet50 import Encoder, identify, load_weights
from captioner.images.load import load_image
from captioner.runtime.device import choose_compute
from captioner.text import END, Vocabulary
from tests.pictures import picture

WORDS = ("red", "green", "circle", "square", "left", "right", "above", "below", "two", "three")
NGRAMS = NGramFrequencies(images=10, counts={(4,): 2, (4, 5): 3})


def write_model(
    root: Path,
    kind: DecoderKind = "merge",
    seed: int = 0,
    decode: DecodeConfig | None = None,
) -> str:
    """A model whose captions, though without sense, differ from picture to picture and from seed to seed."""
    store = _store(root.parent / "encoder")
    vocabulary = Vocabulary.build([WORDS])
    config = DecoderConfig(
        kind=kind, width=32, output_width=32, attention_width=16, layers=1, heads=4, dropout=0.0
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        decoder = build_decoder(config, len(vocabulary), store.manifest.encoder.shape)
    encoder = Encoder.load(store.encoder_weights_uri, store.manifest.encoder)
    images = np.stack([load_image(picture(number)) for number in range(8)])
    pooled, grid = encoder(images, grid=True)
    assert grid is not None
    seen = grid.float().flatten(0, 1) if "grid" in decoder.columns else pooled
    decoder.standardize.fit(seen.mean(dim=0), seen.std(dim=0))
    with torch.no_grad():
        decoder.output.weight *= 5  # decided, so that pictures and words matter
        decoder.output.bias[END] -= 1.0
    output = Output(str(root), {"test": seed})
    weights = pack_weights(decoder.eval())
    record = save_model(
        output, weights=weights, vocabulary=vocabulary, ngrams=NGRAMS, decoder=config, text=TextConfig(),
        decode=decode or DecodeConfig(), store=store, training={},
    )  # fmt: skip
    files = [file.path for file in storage.list_files(str(root))]
    output.publish(
        ModelManifest(weights_sha256=record.weights_sha256, files=files).model_dump_json()
    )
    return str(root)


def _store(root: Path) -> FeatureStore:
    """Enough of a feature store to take the encoder from: ResNet50 up to layer3, random weights."""
    config = EncoderConfig(weights="random", layer="layer3")
    tensors = load_weights(config)
    root.mkdir(exist_ok=True)
    if not (root / ENCODER_WEIGHTS).exists():
        safetensors.torch.save_file(tensors, root / ENCODER_WEIGHTS)
    none = SplitCounts(images=0, ok=0, rejected=0, captions=0)
    manifest = StoreManifest(
        encoder=identify(config, tensors, choose_compute("auto", "cpu")),
        source=SourceIdentity(kind="test", uri="memory://"),
        grid=True,
        total=none,
        splits={},
        files=[],
    )
    return FeatureStore(str(root), manifest)
