"""Decoders behind one base class, and the search that turns their logits into captions."""

from captioner.config import DecoderConfig
from captioner.decoders.adaptive_attention import AdaptiveAttentionDecoder
from captioner.decoders.base import Decoder
from captioner.decoders.ensemble import Ensemble
from captioner.decoders.merge import MergeDecoder
from captioner.decoders.sequence_attention import SequenceAttentionDecoder
from captioner.decoders.spatial_attention import SpatialAttentionDecoder
from captioner.decoders.transformer import TransformerDecoder

DECODERS: dict[
    str,
    type[MergeDecoder | SpatialAttentionDecoder | AdaptiveAttentionDecoder | TransformerDecoder],
] = {
    "merge": MergeDecoder,
    "sequence_attention": SequenceAttentionDecoder,
    "spatial_attention": SpatialAttentionDecoder,
    "adaptive_attention": AdaptiveAttentionDecoder,
    "transformer": TransformerDecoder,
}


def build_decoder(config: DecoderConfig, vocabulary_size: int, channels: int) -> Decoder:
    """A decoder with fresh weights."""
    members = [
        DECODERS[config.kind](config, vocabulary_size, channels)
        for _ in range(config.ensemble_size)
    ]
    return members[0] if len(members) == 1 else Ensemble(members)
