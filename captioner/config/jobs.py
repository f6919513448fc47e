"""Settings of the jobs that make a feature store, a model, a report or captions."""

from typing import Annotated, Literal

import tyro
from pydantic import Field, model_validator

from captioner.config.decoding import DecodeOverrides
from captioner.config.parts import (
    AcceptUnreadable,
    EncoderConfig,
    Fraction,
    ImageLimits,
    JobConfig,
    Positive,
    Restart,
    RetrySeconds,
    Runtime,
    Seed,
    ShapesConfig,
    SourceConfig,
    Split,
)

AcceptGone = Annotated[bool, Field(description="Let more than 5 % of the images of the source go.")]


class ExtractConfig(JobConfig):
    """Extract features: images -> frozen image network -> feature store."""

    source: str
    """shapes, flickr8k, flickr30k, hf:org/name[@revision], or a path or URI: a folder of images, of Parquet files or of
    tar shards, one such file, or a text file that lists some."""
    output: str
    """Directory of the feature store (path or URI)."""
    encoder: EncoderConfig = EncoderConfig()
    source_options: SourceConfig = SourceConfig()
    extends: str | None = None
    """A feature store (path or URI), which stays as it is: the new one is that and what is new in the source, by its
    encoder; what changed or went in the source since counts no more in the new one."""
    accept_gone: AcceptGone = False
    grid: bool = False
    """Also store the grid of vectors (float16), for decoders that look at parts of the picture."""
    mirrored: bool = False
    """Also store the features of every image's mirror image, for augmentation in training (twice the work)."""
    crops: Annotated[int, Field(ge=0, le=16)] = 0
    """Also store the features of so many random crops of every image, for augmentation in training; each is as much
    work as the image itself. With mirrored every other one is mirrored."""
    thumbnails: bool = True
    """Also store a small JPEG of every image, which reports draw; some 8 KB each."""
    limits: ImageLimits = ImageLimits()
    max_reject_fraction: Fraction = 0.01
    """Largest fraction of images that are rejected; past it the job fails and publishes nothing. rejects.csv in the
    output lists them."""
    retry_seconds: RetrySeconds = 60.0
    accept_unreadable: AcceptUnreadable = False
    batch_size: Positive | None = None
    """Most images per forward pass of one encoder actor; default: 32, on a GPU 256. A GPU whose memory does not hold so
    many takes half of them, or a quarter ..."""
    runtime: Literal["auto"] | Runtime = "auto"
    """How the network is run, which a continued run may change. compiled: by torch's compiler, which takes its time
    first: on a GPU a minute or more in every actor. auto: on CPUs, where there are enough images to repay that and it
    is measured to be faster; it wants g++."""
    num_encoders: Positive | None = None
    """Encoder actors; default: one per GPU or, without, what suits the CPUs; fewer for a few hundred images."""
    cpus_per_encoder: Positive | None = None
    """Threads of one encoder actor on CPU; default: chosen from the cluster."""
    restart: Restart = False


class EvaluateConfig(JobConfig):
    """Score a model on one split."""

    features: str | None = None
    """Feature store (path or URI) of the model's encoder; or source."""
    source: str | None = None
    """Pictures to score the model on directly, with its own encoder: shapes, flickr8k, flickr30k,
    hf:org/name[@revision], or a path or URI, as for extract_features."""
    model: str
    """Model directory (path or URI), or hf:org/name[@revision]."""
    output: str
    """Directory of the report (path or URI)."""
    split: Split = "validation"
    """Split to score."""
    decode: DecodeOverrides = DecodeOverrides()
    batch_size: Positive = 64
    """Images per decoding batch at most."""
    seed: Seed = 0
    """Seed of the choice of pictures in the grid."""
    attention_images: Annotated[int, Field(ge=0, le=16)] = 4
    """Images whose attention is drawn word by word, where the decoder looks at places."""
    meteor: bool = True
    """Also compute METEOR where Java is there; it takes some ten seconds and 2 GiB."""
    source_options: SourceConfig = SourceConfig()
    limits: ImageLimits = ImageLimits()
    max_reject_fraction: Fraction = 0.01
    """Of a source, largest fraction of images that are rejected; past it the job fails and publishes nothing.
    rejects.csv in the output lists them."""
    retry_seconds: RetrySeconds = 60.0
    accept_unreadable: AcceptUnreadable = False
    restart: Restart = False

    @model_validator(mode="after")
    def _has_one_input(self) -> "EvaluateConfig":
        if (self.features is None) == (self.source is None):
            raise ValueError("features: give either a feature store, or a source of pictures")
        if self.features is not None and self.source_options != SourceConfig():
            raise ValueError("source_options: are of a source; a feature store has none")
        return self


class CaptionConfig(JobConfig):
    """Caption any collection of images."""

    images: str
    """A folder of images, of Parquet files or of tar shards, one such file, or a text file that lists some (path or
    URI); or hf:org/name[@revision]."""
    model: str
    """Model directory (path or URI), or hf:org/name[@revision]."""
    output: str
    """Directory of the captions (path or URI)."""
    extends: str | None = None
    """Captions (path or URI) of the same model, which stay as they are: the new ones are those and what is new in the
    images; what changed or went there since counts no more in the new ones."""
    accept_gone: AcceptGone = False
    format: Literal["parquet", "jsonl", "csv", "txt", "imagefolder", "xmp"] = "parquet"
    """parquet: files of many rows in captions/, which there always are. jsonl, csv: also one file, captions.jsonl or
    captions.csv. txt, xmp: also a file a picture, in a tree txt/ or xmp/ like the pictures'; xmp is what photo programs
    read. imagefolder: also imagefolder/metadata.jsonl, as the library datasets reads it."""
    beside: bool = False
    """Write txt, xmp or metadata.jsonl next to the (local) pictures instead, never over a file that is there."""
    copy_pictures: bool = False
    """Also copy the pictures into imagefolder/, which is then whole."""
    sentences: bool = False
    """Write captions with a capital and a full stop."""
    contact_sheet: bool = False
    """Also write contact_sheet.html, small pictures with their captions in one file for a browser, and grid.png, the
    first 16 of them."""
    contact_sheet_images: Annotated[int, Field(ge=1, le=1000)] = 100
    """Most pictures on the contact sheet; the first by id."""
    decode: DecodeOverrides = DecodeOverrides()
    limits: ImageLimits = ImageLimits()
    max_reject_fraction: Fraction = 0.5
    """Largest fraction of images that are rejected; past it the job fails and publishes nothing. rejects.csv in the
    output lists them."""
    retry_seconds: RetrySeconds = 60.0
    accept_unreadable: AcceptUnreadable = False
    source_options: SourceConfig = SourceConfig()
    batch_size: Positive = 32
    """Images per batch of one captioning actor."""
    num_captioners: Positive | None = None
    """Captioning actors; default: one per GPU or, without, what suits the CPUs; fewer for a few hundred images."""
    cpus_per_captioner: Positive | None = None
    """Threads of one captioning actor on CPU; default: chosen from the cluster."""
    restart: Restart = False

    @model_validator(mode="after")
    def _form_fits(self) -> "CaptionConfig":
        if self.beside and self.format not in ("txt", "xmp", "imagefolder"):
            raise ValueError(f"beside: is for txt, xmp and imagefolder, not for {self.format}")
        if self.beside and self.copy_pictures:
            raise ValueError("beside: the pictures are there; leave out copy_pictures")
        if self.copy_pictures and self.format != "imagefolder":
            raise ValueError(f"copy_pictures: is for imagefolder, not for {self.format}")
        return self


class VerifyConfig(JobConfig):
    """Check a published directory."""

    uri: tyro.conf.Positional[str]
    """Feature store, model, captions, report or search (path or URI)."""


class CompactConfig(JobConfig):
    """Publish a feature store that has grown as one that needs no older parts."""

    features: str
    """Feature store (path or URI)."""
    output: str
    """Directory of the new one (path or URI)."""
    restart: Restart = False


class SearchConfig(JobConfig):
    """Find the images of a store that are most like one."""

    features: str
    """Feature store (path or URI)."""
    image: str
    """A picture (path or URI)."""
    output: str | None = None
    """Directory of what is found (path or URI); default: one in runs/search/, named after picture and store."""
    k: Annotated[Positive, tyro.conf.arg(aliases=["-k"])] = 20
    """How many."""
    limits: ImageLimits = ImageLimits()
    restart: Restart = False


class PushConfig(JobConfig):
    """Publish a model on the Hugging Face hub. The token is the hub's own ($HF_TOKEN, ``hf auth login``)."""

    model: str
    """Model directory (path or URI)."""
    repo: str
    """The hub's name of it: org/name."""
    report: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A report of the model, whose scores its card shows; may be repeated."""
    dataset: str | None = None
    """The hub's name of the data set that it was trained on, for its card."""
    license: str = "other"
    """The hub's name of its licence, for its card; LICENSES.md says what the data allow."""
    private: bool = False
    """Make a new repository private."""


class DemoConfig(JobConfig):
    """Everything end to end on generated pictures."""

    output: str = "runs/demo"
    """Directory that receives features/, model/, report/, captions/ and truth.json (path or URI)."""
    shapes: ShapesConfig = ShapesConfig(train=3600)
    encoder: EncoderConfig = EncoderConfig(name="timm:resnet10t", weights="random", input_size=128)
    decode: DecodeOverrides = DecodeOverrides()
    epochs: Positive = 12
    """Most passes over the train captions."""
    restart: Restart = False
