"""Small decoders with fresh weights, and random features and captions for them."""

import torch
from torch import Tensor, nn

from captioner.config import DECODER_KINDS, DecoderConfig
from captioner.decoders import build_decoder, decoder_class
from captioner.decoders.base import Features
from captioner.encoders.spec import FeatureShape
from captioner.text import END, PAD, START

VOCABULARY = 23
SHAPE = FeatureShape(pooled_channels=10, grid_channels=12, rows=3, columns=5)
KINDS = sorted(DECODER_KINDS)
ATTENDING = sorted(kind for kind in DECODER_KINDS if decoder_class(kind).attends)


def small_decoder(
    kind: str = "merge", *, seed: int = 0, vocabulary: int = VOCABULARY, **settings: object
) -> nn.Module:
    """A decoder in evaluation mode, the same for the same seed; ``settings`` are those of ``DecoderConfig``."""
    sizes = {"width": 16, "output_width": 16, "attention_width": 8, "heads": 4, "layers": 1}
    torch.manual_seed(seed)
    config = DecoderConfig.model_validate({"kind": kind} | sizes | settings)
    return build_decoder(config, vocabulary, SHAPE).eval()


def features(images: int) -> Features:
    """Pooled vectors and grids, the same for every call."""
    generator = torch.Generator().manual_seed(1)
    return {
        "pooled": torch.randn(images, *SHAPE.of("pooled"), generator=generator),
        "grid": torch.randn(images, *SHAPE.of("grid"), generator=generator),
    }


def captions(*lengths: int) -> Tensor:
    """Captions of these numbers of words, padded together, the same for every call."""
    generator = torch.Generator().manual_seed(2)
    rows = [
        torch.cat(
            [
                torch.tensor([START]),
                torch.randint(4, VOCABULARY, (length,), generator=generator),
                torch.tensor([END]),
            ]
        )
        for length in lengths
    ]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
