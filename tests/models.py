"""Tiny published models with untrained weights, for tests of what loads and serves them."""

from functools import cache
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import nn

from captioner import storage
from captioner.artifacts.feature_store import FeatureStore
from captioner.artifacts.manifests import EncoderRecord, ModelManifest
from captioner.artifacts.model_directory import pack_weights, save_model
from captioner.artifacts.output import Output
from captioner.config import DecodeConfig, DecoderConfig, DecoderKind, EncoderConfig, TextConfig
from captioner.decoders import build_decoder
from captioner.decoding.cider import NGramFrequencies
from captioner.encoders.encoder import Encoder
from captioner.encoders.family import family_of
from captioner.encoders.spec import EncoderSpec
from captioner.encoders.weights import Tensors
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
    *,
    grid: tuple[int, int] = (7, 7),
) -> str:
    """A model whose captions, though without sense, differ from picture to picture and from seed to seed."""
    spec, tensors = _encoder()
    size = (32 * grid[0], 32 * grid[1])
    spec = spec.model_copy(update={"grid": grid, "input_size": size})
    vocabulary = Vocabulary.build([WORDS])
    config = DecoderConfig(
        kind=kind, width=32, output_width=32, attention_width=16, layers=1, heads=4, dropout=0.0
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        decoder = build_decoder(config, len(vocabulary), spec.shape)
    encoder = Encoder(spec, tensors)
    images = np.stack([load_image(picture(number), spec.fit).pixels for number in range(8)])
    pooled, cells = encoder(images, grid=True)
    assert cells is not None
    seen = cells.float().flatten(0, 1) if "grid" in decoder.columns else pooled
    decoder.standardize.fit(seen.mean(dim=0), seen.std(dim=0))
    with torch.no_grad():
        decoder.output.weight *= 5  # decided, so that pictures and words matter
        decoder.output.bias[END] -= 1.0
    return publish_model(
        root,
        decoder,
        config,
        vocabulary,
        encoder=(EncoderRecord(spec=spec, weights="random"), safetensors.torch.save(tensors)),
        decode=decode,
    )


def publish_model(
    root: Path,
    decoder: nn.Module,
    config: DecoderConfig,
    vocabulary: Vocabulary,
    *,
    encoder: tuple[EncoderRecord, bytes],
    decode: DecodeConfig | None = None,
    ngrams: NGramFrequencies | None = NGRAMS,
) -> str:
    """A model directory with a decoder, and with an encoder and its weights."""
    output = Output(str(root), {"job": "test"})
    with output:
        files = save_model(
            output,
            weights=pack_weights(decoder),
            vocabulary=vocabulary,
            ngrams=ngrams,
            decoder=config,
            text=TextConfig(),
            decode=decode or DecodeConfig(),
            encoder=encoder[0],
            encoder_weights=encoder[1],
            training={"epochs": 1},
        )
        output.publish(ModelManifest(files=files))
    return str(root)


def encoder_of(store: FeatureStore) -> tuple[EncoderRecord, bytes]:
    return store.manifest.encoder, storage.read_bytes(store.encoder_weights_uri)


@cache
def _encoder() -> tuple[EncoderSpec, Tensors]:
    """ResNet50 up to layer3, random weights."""
    config = EncoderConfig(weights="random", layer="layer3")
    family, _ = family_of(config.name)
    tensors, _ = family.weights(config)
    return family.spec(config, tensors, choose_compute("auto", "cpu")), tensors
