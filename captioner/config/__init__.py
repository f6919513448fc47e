"""Every setting of every job, as frozen pydantic models: parsed by tyro, stored in manifests, reused by the service.

A docstring under a field is its ``--help`` text. "Per worker" and "global" are always said of batch sizes.
"""

from captioner.config.decoding import DecodeConfig, DecodeOverrides
from captioner.config.jobs import (
    CaptionConfig,
    CompactConfig,
    DemoConfig,
    EvaluateConfig,
    ExtractConfig,
    PushConfig,
    SearchConfig,
    VerifyConfig,
)
from captioner.config.learning import FinetuneConfig, LearningConfig, TrainConfig
from captioner.config.parts import (
    DECODER_KINDS,
    Compute,
    Config,
    DecoderConfig,
    DecoderKind,
    EncoderConfig,
    Fraction,
    ImageLimits,
    JobConfig,
    OptimizerConfig,
    Positive,
    Runtime,
    ShapesConfig,
    SourceConfig,
    Split,
    TextConfig,
)
from captioner.config.serving import ReplicaSettings, ServeConfig, UploadBounds
from captioner.config.tuning import TuneConfig

__all__ = [
    "DECODER_KINDS",
    "CaptionConfig",
    "CompactConfig",
    "Compute",
    "Config",
    "DecodeConfig",
    "DecodeOverrides",
    "DecoderConfig",
    "DecoderKind",
    "DemoConfig",
    "EncoderConfig",
    "EvaluateConfig",
    "PushConfig",
    "SearchConfig",
    "ExtractConfig",
    "FinetuneConfig",
    "Fraction",
    "ImageLimits",
    "JobConfig",
    "LearningConfig",
    "OptimizerConfig",
    "Positive",
    "ReplicaSettings",
    "Runtime",
    "ServeConfig",
    "ShapesConfig",
    "SourceConfig",
    "Split",
    "TextConfig",
    "TrainConfig",
    "TuneConfig",
    "UploadBounds",
    "VerifyConfig",
]
