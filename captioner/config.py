"""Every setting of every job, as frozen pydantic models: parsed by tyro, stored in manifests, reused by the service.

A docstring under a field is its ``--help`` text. "Per worker" and "global" are always said of batch sizes.
"""

from typing import Annotated, Literal

import tyro
from pydantic import BaseModel, ConfigDict, Field, model_validator

Split = Literal["train", "validation", "test"]
DecoderKind = Literal["merge", "sequence_attention", "spatial_attention", "transformer"]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1)]


class Config(BaseModel):
    """Base: immutable, no unknown keys, help texts from the docstrings under the fields."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )


class ImageLimits(Config):
    """What is refused before a single pixel is decoded."""

    max_bytes: Positive = 32 * 2**20
    """Largest encoded image, in bytes."""
    max_pixels: Positive = 64_000_000
    """Largest width x height, in pixels, read from the header."""


class EncoderConfig(Config):
    """The frozen image network."""

    name: Literal["resnet50", "resnet50_v1"] = "resnet50"
    """resnet50: torchvision's (stride on the 3x3). resnet50_v1: of 2015 (stride on the first 1x1, Caffe inputs)."""
    weights: str = "IMAGENET1K_V2"
    """IMAGENET1K_V2, IMAGENET1K_V1, random (seeded), or a .safetensors or .pth file (path or URI)."""
    layer: Literal["layer4", "layer3"] = "layer4"
    """Last stage to run. layer4: 7x7 cells x 2048 channels. layer3: 14x14 x 1024, averaged to 7x7 for the grid."""
    compute: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the network; auto: bfloat16 where the processor has it, else float32."""
    seed: int = 0
    """Seed of the weights when weights=random."""


class ShapesConfig(Config):
    """Size of the generated data set (source ``shapes``)."""

    train: Positive = 2400
    """Images in the train split."""
    validation: Positive = 200
    """Images in the validation split."""
    test: Positive = 200
    """Images in the test split."""
    seed: int = 0
    """Seed of the scenes."""


class SourceConfig(Config):
    """Details of a source; the defaults suit most."""

    captions: str | None = None
    """Captions file of a folder of images (path or URI); default: found in the folder by its name."""
    split: Literal["auto"] | Split = "auto"
    """Split of images that carry none. auto: 80/10/10 by a hash of the id where there are captions, else test."""
    limit: Positive | None = None
    """Take only the first N images of each split."""
    shapes: ShapesConfig = ShapesConfig()


class ExtractConfig(Config):
    """Extract features: images -> frozen ResNet50 -> feature store."""

    source: str
    """shapes, flickr8k, flickr30k, or a path or URI: a folder of images or a folder of Parquet files."""
    output: str
    """Directory of the feature store (path or URI)."""
    encoder: EncoderConfig = EncoderConfig()
    source_options: SourceConfig = SourceConfig()
    grid: bool = False
    """Also store the 7x7 grid of vectors (float16), for decoders that look at parts of the picture."""
    limits: ImageLimits = ImageLimits()
    max_reject_fraction: Fraction = 0.01
    """Largest fraction of unreadable images; past it the job fails and publishes nothing."""
    batch_size: Positive = 32
    """Images per forward pass of one encoder actor."""
    num_encoders: Positive | None = None
    """Encoder actors; default: one per GPU, or as many as the CPUs feed best."""
    cpus_per_encoder: Positive | None = None
    """Threads of one encoder actor on CPU; default: chosen from the cluster."""


class TextConfig(Config):
    """How captions become tokens."""

    rules: Literal["standard", "seed"] = "standard"
    """standard: lower-case letters and digits. seed: the notebook's own cleaning and tokenizer, for comparison."""
    min_count: Positive = 1
    """Words seen fewer times than this in the train split become <unk>."""
    max_length: Annotated[int, Field(ge=3, le=202)] = 40
    """Longest caption in tokens, <start> and <end> included; longer ones are cut when training."""


class DecoderConfig(Config):
    """The caption decoder."""

    kind: DecoderKind = "merge"
    """merge and sequence_attention read the pooled vector, spatial_attention and transformer the grid."""
    width: Positive = 256
    """Width D of embeddings and hidden states."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.5
    """Dropout probability."""
    output_width: Positive = 128
    """merge, sequence_attention: width of the dense layer before the vocabulary."""
    attention_width: Positive = 256
    """sequence_attention, spatial_attention: width of the additive attention."""
    layers: Positive = 3
    """transformer: number of blocks."""
    heads: Positive = 8
    """transformer: attention heads; must divide the width."""
    tie_embeddings: bool = False
    """spatial_attention, transformer: share the word embedding with the output layer."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "DecoderConfig":
        if self.kind == "transformer" and self.width % self.heads:
            raise ValueError(f"heads: {self.heads} must divide width {self.width}")
        return self


class OptimizerConfig(Config):
    """Optimizer and learning-rate schedule."""

    name: Literal["adam", "adamw", "rmsprop"] = "adam"
    """Update rule."""
    learning_rate: Annotated[float, Field(gt=0.0)] = 1e-3
    """Peak learning rate."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight decay (decoupled with adamw, L2 otherwise)."""
    clip_norm: Annotated[float, Field(gt=0.0)] | None = 5.0
    """Largest global gradient norm; None switches clipping off."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps of linear warm-up."""
    schedule: Literal["constant", "plateau", "cosine"] = "plateau"
    """plateau: times plateau_factor after plateau_patience epochs without a better loss. cosine: to 0 at the end."""
    plateau_factor: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    """Factor of the plateau schedule."""
    plateau_patience: Annotated[int, Field(ge=0)] = 3
    """Epochs without improvement before the plateau schedule acts."""
    minimum: Annotated[float, Field(ge=0.0)] = 1e-8
    """Smallest learning rate of the plateau schedule."""


class DecodeConfig(Config):
    """Search for the caption."""

    beam_size: Annotated[int, Field(ge=1, le=32)] = 3
    """Beams kept per image; 1 is greedy."""
    num_captions: Annotated[int, Field(ge=1, le=32)] = 1
    """Captions returned per image, best first; at most beam_size."""
    max_length: Annotated[int, Field(ge=1, le=200)] = 30
    """Longest caption, in words."""
    length_penalty: Annotated[float, Field(ge=0.0, le=3.0)] = 0.7
    """Scores are divided by length ** penalty; 0 ranks by plain log-probability."""
    no_repeat_ngram: Annotated[int, Field(ge=0, le=10)] = 0
    """Forbid any n-gram of this size from occurring twice in a caption; 0 allows repeats."""

    @model_validator(mode="after")
    def _captions_fit_beam(self) -> "DecodeConfig":
        if self.num_captions > self.beam_size:
            raise ValueError(
                f"num_captions: {self.num_captions} must be at most beam_size {self.beam_size}"
            )
        return self


class TrainConfig(Config):
    """Train a decoder on a feature store."""

    features: str
    """Feature store (path or URI)."""
    output: str
    """Directory of the model (path or URI)."""
    decoder: DecoderConfig = DecoderConfig()
    text: TextConfig = TextConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    epochs: Positive = 20
    """Most passes over the train captions."""
    global_batch: Positive = 64
    """Captions per optimizer step, over all workers together."""
    patience: Positive | None = 5
    """Stop after this many epochs without a better validation loss; None trains all epochs."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Probability mass spread over the vocabulary in the training loss (validation never smooths)."""
    num_workers: Positive = 1
    """Data-parallel workers (DDP); each takes one GPU where the cluster has any."""
    compute: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the forward and backward passes; weights stay float32. auto: bfloat16 where it is fast."""
    seed: int = 0
    """Seed of weights, dropout and the order of captions."""
    max_failures: Annotated[int, Field(ge=0)] = 2
    """Worker failures survived by restarting from the last checkpoint."""


class EvaluateConfig(Config):
    """Score a model on one split."""

    features: str
    """Feature store (path or URI)."""
    model: str
    """Model directory (path or URI)."""
    output: str
    """Directory of the report (path or URI)."""
    split: Split = "validation"
    """Split to score."""
    decode: DecodeConfig = DecodeConfig()
    batch_size: Positive = 64
    """Images per decoding batch."""
    seed: int = 0
    """Seed of the choice of pictures in the grid."""


class CaptionConfig(Config):
    """Caption any collection of images."""

    images: str
    """A folder, one image file, a Parquet file or a folder of them (path or URI)."""
    model: str
    """Model directory (path or URI)."""
    output: str
    """Directory of the captions (path or URI)."""
    decode: DecodeConfig = DecodeConfig()
    limits: ImageLimits = ImageLimits()
    max_reject_fraction: Fraction = 1.0
    """Largest fraction of unreadable images; past it the job fails and publishes nothing."""
    source_options: SourceConfig = SourceConfig()
    batch_size: Positive = 32
    """Images per batch of one captioning actor."""
    num_captioners: Positive | None = None
    """Captioning actors; default: one per GPU, or as many as the CPUs feed best."""
    cpus_per_captioner: Positive | None = None
    """Threads of one captioning actor on CPU; default: chosen from the cluster."""


class BenchmarkExtractConfig(Config):
    """Measure extraction on this machine or cluster: each stage alone, then the pipeline."""

    source: str = "shapes"
    """As for extract_features; its images are repeated to reach the number wanted."""
    source_options: SourceConfig = SourceConfig()
    encoder: EncoderConfig = EncoderConfig(weights="random")
    grid: bool = False
    """Also compute and store the grid."""
    images: Annotated[int, Field(ge=100)] = 2000
    """Images through the pipeline."""
    seconds: Annotated[float, Field(gt=0.0)] = 10.0
    """How long each stage is measured alone."""
    batch_size: Positive = 32
    """Images per forward pass of one encoder actor."""
    num_encoders: Positive | None = None
    """Encoder actors; default: as extract_features chooses."""
    cpus_per_encoder: Positive | None = None
    """Threads of one encoder actor on CPU; default: as extract_features chooses."""
    json_file: Annotated[str | None, tyro.conf.arg(name="json")] = None
    """Also write the result to this file (path or URI)."""


class DemoConfig(Config):
    """Everything end to end on generated pictures."""

    output: str = "runs/demo"
    """Directory that receives features/, model/, report/ and captions/ (path or URI)."""
    shapes: ShapesConfig = ShapesConfig()
    encoder: EncoderConfig = EncoderConfig(weights="random")
    decode: DecodeConfig = DecodeConfig()
    epochs: Positive = 30
    """Most passes over the train captions."""
