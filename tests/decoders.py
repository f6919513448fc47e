"""Small decoders with fresh weights, and random features and captions for them."""

import torch
from torch import Tensor, nn

from captioner.config import DecoderConfig
from captioner.decoders import DECODERS, build_decoder
from captioner.decoders.base import Features
from captioner.text import END, PAD, START

VOCABULARY, CHANNELS, CELLS = 23, 12, 49
KINDS = sorted(DECODERS)
ATTENDING = ["spatial_attention", "adaptive_attention", "transformer"]


def small_decoder(
    kind: str = "merge", *, seed: int = 0, vocabulary: int = VOCABULARY, **settings: object
) -> nn.Module:
    """A decoder in evaluation mode, the same for the same seed; ``settings`` are those of ``DecoderConfig``."""
    sizes = {"width": 16, "output_width": 16, "attention_width": 8, "heads": 4, "layers": 1}
    torch.manual_seed(seed)
    config = DecoderConfig.model_validate({"kind": kind} | sizes | settings)
    return build_decoder(config, vocabulary, CHANNELS).eval()


def features(images: int) -> Features:
    """Pooled vectors and grids, the same for every call."""
    generator = torch.Generator().manual_seed(1)
    return {
        "pooled": torch.randn(images, CHANNELS, generator=generator),
        "grid": torch.randn(images, CELLS, CHANNELS, generator=generator),
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
