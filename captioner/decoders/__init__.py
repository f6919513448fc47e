"""The networks that write captions, one module each, behind one base class."""

from importlib import import_module

from captioner.config import DecoderConfig, DecoderKind
from captioner.decoders.base import Decoder
from captioner.decoders.ensemble import Ensemble
from captioner.encoders.spec import FeatureShape


def decoder_class(kind: DecoderKind) -> type[Decoder]:
    """The class of a kind, from the module of its name: of ``spatial_attention`` its ``SpatialAttentionDecoder``."""
    module = import_module(f"captioner.decoders.{kind}")
    found: type[Decoder] = getattr(module, f"{kind.title().replace('_', '')}Decoder")
    return found


def build_decoder(config: DecoderConfig, vocabulary_size: int, shape: FeatureShape) -> Decoder:
    """A decoder with fresh weights, or an ensemble of them.

    Args:
        shape: of the features it reads.

    Raises:
        ConfigError: settings do not fit each other.
    """
    kind = decoder_class(config.kind)
    members = [kind(config, vocabulary_size, shape) for _ in range(config.ensemble_size)]
    return members[0] if len(members) == 1 else Ensemble(members)
