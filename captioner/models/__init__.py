"""Decoders behind one protocol, and the search that turns their logits into captions."""

from torch import nn

from captioner.config import DecoderConfig
from captioner.models.merge import MergeDecoder

DECODERS = {"merge": MergeDecoder}


def build_decoder(config: DecoderConfig, vocabulary_size: int, channels: int) -> nn.Module:
    """A decoder with fresh weights; it fulfils ``models.base.Decoder``."""
    return DECODERS[config.kind](config, vocabulary_size, channels)
