"""What the settings of several jobs share."""

from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

Split = Literal["train", "validation", "test"]
DecoderKind = Literal[
    "merge", "sequence_attention", "spatial_attention", "adaptive_attention", "transformer"
]
"""Every kind of decoder: the modules of ``captioner.decoders`` that hold one."""
DECODER_KINDS: tuple[DecoderKind, ...] = get_args(DecoderKind)
Compute = Literal["float32", "bfloat16"]
Runtime = Literal["eager", "compiled"]
"""How a network is run, which changes its results by rounding at most."""
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Restart = Annotated[
    bool,
    Field(
        description="Clear what an earlier run left unfinished in the output, of whatever settings, and begin anew. "
        "What is published is never cleared."
    ),
]
RetrySeconds = Annotated[
    float,
    Field(
        ge=0.0,
        description="How long a task waits for a source that is out of reach (overloaded, slow, away), in seconds an "
        "outage. Images that still cannot be read are left for the same command to try again: status 75.",
    ),
]
AcceptUnreadable = Annotated[
    bool,
    Field(
        description="Publish without the images that could not be read; their rows say so, as worth another try."
    ),
]


Track = Annotated[
    Literal["mlflow"] | None,
    Field(
        description="Also follow the run in MLflow (pip install mlflow-skinny), at $MLFLOW_TRACKING_URI and in "
        "$MLFLOW_EXPERIMENT_NAME (captioner)."
    ),
]


class Config(BaseModel):
    """Base: immutable, no unknown keys, help texts from the docstrings under the fields."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )


class JobConfig(Config):
    """Base of the settings of a job."""

    # How a run is shown is no part of what it makes: in no claim, record or manifest.
    verbose: Annotated[bool, Field(exclude=True)] = False
    """Also show what Ray and the workers write; otherwise it is in the logs of Ray's session."""


def check_gpu_share(name: str, share: float, workers: int) -> None:
    """Refuse part of a GPU for each of several workers of one run: NCCL wants a GPU of its own for every one of them.

    Raises:
        ValueError: of the setting ``name``.
    """
    if share < 1 and workers > 1:
        raise ValueError(
            f"{name}: {share:g} puts several of {workers} workers on one GPU, and workers of one run cannot share any; "
            "it must be 1, or the workers 1"
        )


class ImageLimits(Config):
    """What is refused before a single pixel is loaded."""

    max_bytes: Positive = 32 * 2**20
    """Largest encoded image, in bytes."""
    max_pixels: Positive = 64_000_000
    """Largest width x height, in pixels, read from the header."""
    max_load_bytes: Positive = 768 * 2**20
    """Most memory that loading may take, in bytes, estimated from the header: some 8 to 17 a pixel, by format."""


class EncoderConfig(Config):
    """The image network, frozen."""

    name: str = "resnet50"
    """resnet50: torchvision's (stride on the 3x3). resnet50_v1: of 2015 (stride on the first 1x1, Caffe inputs), the
    notebook's. timm:NAME[.TAG]: any backbone of timm that gives a pooled vector and a feature map."""
    weights: str = "pretrained"
    """pretrained: as published with the network (resnet50: IMAGENET1K_V2; timm: from its hub). IMAGENET1K_V1 or _V2 of
    resnet50, random (seeded), or a .safetensors or .pth file (path or URI)."""
    layer: Literal["layer3", "layer4"] | None = None
    """Of ResNet50 the last stage to run. layer4 (default): 2048 channels. layer3: 1024, twice as many rows and columns,
    averaged to those of layer4 for the grid."""
    input_size: Positive | None = None
    """Side of the square input in pixels; default: the network's own."""
    compute: Literal["auto", Compute] = "auto"
    """Arithmetic of the network; auto: bfloat16 where the processor has it, else float32."""
    seed: Seed = 0
    """Seed of the weights when weights=random."""


class ShapesConfig(Config):
    """Size of the generated data set (source ``shapes``)."""

    train: Positive = 2400
    """Images in the train split."""
    validation: Positive = 200
    """Images in the validation split."""
    test: Positive = 200
    """Images in the test split."""
    seed: Seed = 0
    """Seed of the scenes."""


class SourceConfig(Config):
    """Details of a source; the defaults suit most."""

    captions: str | None = None
    """Captions file of a folder of images (path or URI), or none; default: what lies in the folder, found by name and
    content."""
    image_column: str | None = None
    """Column of the images' names or bytes, in a captions file or a Parquet file; default: found by name and content.
    1, 2 ... in a table whose first line names no columns."""
    caption_columns: tuple[str, ...] = ()
    """Columns of captions, likewise."""
    split_column: str | None = None
    """Column that names each image's split, likewise."""
    id_column: str | None = None
    """Column of ids of your own, unique; default: an image's path, or a Parquet file's and the row's number in it."""
    subset: str | None = None
    """Subset (configuration) of a data set of the hub that has several."""
    encoding: str | None = None
    """Encoding of captions files, where no byte-order mark says it; default: UTF-8."""
    missing: Literal["error", "skip"] = "error"
    """Of captioned images that are not there: stop, or go on without them."""
    partial: bool = False
    """Take a set of Parquet files or shards as it is, though its names say that it has more."""
    sniff: bool = False
    """Also take files without a suffix that is known here, where their content is a picture's."""
    exclude: tuple[str, ...] = ()
    """Globs of files or folders to leave out; one without / holds at any depth."""
    split: Literal["auto", Split] = "auto"
    """Split of images that carry none. auto: 80/10/10 by a hash of the id where there are captions, else test; train
    where other images do carry one."""
    limit: Positive | None = None
    """Take only the first N images of each split."""
    id_prefix: str | None = None
    """What ids begin with, where those of two sources of one collection would be the same."""
    digest: bool = False
    """When a collection is extended, look at the content of images whose size and time are what they were, too."""
    shapes: ShapesConfig = ShapesConfig()


class TextConfig(Config):
    """How captions become tokens."""

    rules: Literal["standard", "notebook"] = "standard"
    """standard: lower-case letters and digits of any script. notebook: the notebook's own cleaning and tokenizer, for
    comparison."""
    min_count: Positive = 1
    """Words seen fewer times than this in the train split become <unk>; under the notebook's rules they vanish."""
    max_length: Annotated[int, Field(ge=3, le=202)] = 40
    """Longest caption in tokens, <start> and <end> included; longer ones are cut when training."""


class DecoderConfig(Config):
    """The caption decoder."""

    kind: DecoderKind = "merge"
    """merge and sequence_attention read the pooled vector; spatial_attention, adaptive_attention and transformer the
    grid."""
    ensemble_size: Annotated[int, Field(ge=1, le=16)] = 1
    """Decoders trained side by side whose probabilities of a token are averaged. The training loss is the mean of
    theirs, so clip_norm bounds their gradients together."""
    standardize: Literal["channels", "whole"] = "channels"
    """channels: each channel of the features to mean 0, variance 1. whole: one factor for all channels of a column,
    which keeps their proportions."""
    width: Positive = 256
    """Width D of embeddings and hidden states."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.5
    """Dropout probability."""
    feature_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    """Decoders of the grid: dropout probability of the channels of its cells."""
    output_width: Positive = 128
    """merge, sequence_attention: width of the dense layer before the vocabulary."""
    attention_width: Positive = 256
    """sequence_attention, spatial_attention: width of the additive attention."""
    layers: Positive = 3
    """transformer: number of blocks."""
    picture_layers: Annotated[int, Field(ge=0)] = 0
    """adaptive_attention, transformer: blocks of self-attention over the grid's cells, before the decoder attends to
    them."""
    heads: Positive = 8
    """adaptive_attention, transformer: attention heads; must divide the width."""
    tie_embeddings: bool = False
    """Decoders of the grid: share the word embedding with the output layer."""


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
    """plateau: times plateau_factor after plateau_patience epochs without a better loss, or a better CIDEr-D where
    validation_cider is on. cosine: to 0 at the end."""
    plateau_factor: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    """Factor of the plateau schedule."""
    plateau_patience: Annotated[int, Field(ge=0)] = 3
    """Epochs without improvement before the plateau schedule acts."""
    minimum: Annotated[float, Field(ge=0.0)] = 1e-8
    """Smallest learning rate of the plateau schedule."""
