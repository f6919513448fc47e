"""Column names, table schemas and manifests of everything a job publishes, and their checks on read."""

from collections.abc import Sequence
from typing import Literal

import pyarrow as pa
from pydantic import BaseModel, ConfigDict

from captioner.encoders.spec import Column, FeatureShape

SCHEMA_VERSION = 1
SPLITS = ("train", "validation", "test")
GRID_SIDE = 7
GRID_CELLS = GRID_SIDE * GRID_SIDE
MIRRORED = "_mirrored"

# What a source's Read emits: one row per image, before anything is decoded.
SOURCE_ROWS = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("bytes", pa.large_binary()),  # null: the file could not be read
        pa.field("error", pa.string()),  # why, null when the bytes are there
    ]
)

CAPTION_ROWS = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("caption", pa.string(), nullable=False),
        pa.field("index", pa.int32(), nullable=False),  # 0, 1, ... within one image
    ]
)


def view_names(mirrored: bool, crops: int) -> tuple[str, ...]:
    """What the feature columns of an image's other views have after their names: ``_mirrored``, ``_crop1`` ..."""
    return (MIRRORED,) * mirrored + tuple(f"_crop{number + 1}" for number in range(crops))


def column_name(column: Column, view: str) -> str:
    """Name of the feature column of a view, "" for the image itself."""
    return f"{column}{view}"


def feature_rows(channels: int, grid: bool, views: Sequence[str] = ()) -> pa.Schema:
    """Schema of ``features/*.parquet`` for an encoder with ``channels`` output channels.

    ``pooled`` is float32 [C], ``grid`` float16 [P, C] with P = 49 cells in row-major order; those of other views of the
    image have these ``views`` (``view_names``) after their names.
    """
    fields = [
        pa.field("image_id", pa.string()),
        pa.field("split", pa.string()),
        pa.field("uri", pa.string()),
        pa.field("pooled", pa.fixed_shape_tensor(pa.float32(), [channels])),
    ]
    if grid:
        fields.append(pa.field("grid", pa.fixed_shape_tensor(pa.float16(), [GRID_CELLS, channels])))
    own = fields[3:]
    fields += [field.with_name(f"{field.name}{view}") for view in views for field in own]
    return pa.schema([*fields, pa.field("error", pa.string())])


class Record(BaseModel):
    """Base of everything written to a manifest: immutable, and strict about what it reads."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class EncoderIdentity(Record):
    """What decides the value of an embedding; two stores with equal identities can be mixed."""

    name: Literal["resnet50", "resnet50_v1"]
    layer: Literal["layer4", "layer3"]
    weights: str
    """Name of the weights: an enum name, ``random(seed=0)``, or the file's base name."""
    weights_sha256: str
    """SHA-256 over the tensors in ``encoder.safetensors``."""
    preprocessing: str
    compute: Literal["float32", "bfloat16"]
    channels: int

    @property
    def shape(self) -> FeatureShape:
        return FeatureShape(self.channels, self.channels, GRID_SIDE, GRID_SIDE)


class SourceIdentity(Record):
    """Where the images came from; decides whether a run may continue another's directory."""

    kind: str
    uri: str
    options: dict[str, str | int | None] = {}


class FileEntry(Record):
    """One data file of a published directory, its path relative to the manifest."""

    path: str
    rows: int


class SplitCounts(Record):
    images: int
    ok: int
    rejected: int
    captions: int


class StoreManifest(Record):
    """``manifest.json`` of a feature store; its presence is what makes the directory a store."""

    kind: Literal["features"] = "features"
    schema_version: int = SCHEMA_VERSION
    encoder: EncoderIdentity
    source: SourceIdentity
    grid: bool
    mirrored: bool = False
    """Whether the features of mirrored images are there, too."""
    crops: int = 0
    """Random crops of every image whose features are there, too."""
    total: SplitCounts
    splits: dict[str, SplitCounts]
    files: list[FileEntry]


class CaptionsManifest(Record):
    """``manifest.json`` of a captioned collection."""

    kind: Literal["captions"] = "captions"
    schema_version: int = SCHEMA_VERSION
    model: str
    """URI of the model directory."""
    weights_sha256: str
    """SHA-256 of the model's ``weights.safetensors``."""
    decode: dict[str, int | float]
    source: SourceIdentity
    images: int
    rejected: int
    files: list[FileEntry]


class ReportManifest(Record):
    """``manifest.json`` of an evaluation report."""

    kind: Literal["report"] = "report"
    schema_version: int = SCHEMA_VERSION
    model: str
    features: str
    split: str
    images: int
    files: list[str]


CAPTIONED_ROWS = pa.schema(
    [
        pa.field("image_id", pa.string()),
        pa.field("uri", pa.string()),
        pa.field("caption", pa.string()),
        pa.field("log_prob", pa.float32()),  # natural logarithm, summed over the words and <end>
        pa.field(
            "alternatives",
            pa.list_(pa.struct([("caption", pa.string()), ("log_prob", pa.float32())])),
        ),
        pa.field("error", pa.string()),
    ]
)
