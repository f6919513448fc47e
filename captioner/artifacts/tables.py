"""Schemas of the tables that sources emit and jobs publish."""

from collections.abc import Sequence

import pyarrow as pa

from captioner.encoders.spec import Column, FeatureShape

SPLITS = ("train", "validation", "test")
# Kinds of error: the picture itself is to blame, or what it lies on.
FINAL, RETRYABLE = "final", "retryable"
# Of a row that was read again and found to be what an older part of the collection has: it counts for nothing.
UNCHANGED = "unchanged"

_PICTURE = [
    pa.field("image_id", pa.string(), nullable=False),
    pa.field("uri", pa.string(), nullable=False),
    pa.field("size", pa.int64()),  # bytes
    pa.field("mtime", pa.timestamp("ns", "UTC")),  # null where the source knows none
]
_ERROR = [
    pa.field("error", pa.string()),  # null when fine
    pa.field("error_kind", pa.string()),  # FINAL or RETRYABLE
]

# What a source's Read emits: one row per image, before anything is loaded.
SOURCE_ROWS = pa.schema(
    [*_PICTURE, pa.field("bytes", pa.large_binary()), *_ERROR]  # bytes are null where error is not
)

# Every image of a store has a row at least; an image without captions one in which both are null.
CAPTION_ROWS = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("caption", pa.string()),
        pa.field("index", pa.int32()),  # 0, 1, ... within one image
    ]
)

# What a collection that grows compares.
STATES = pa.schema([_PICTURE[0], *_PICTURE[2:]])
REMOVED_ROWS = pa.schema(
    [
        pa.field("file", pa.string(), nullable=False),
        pa.field("image_id", pa.string(), nullable=False),
    ]
)

CAPTIONED_ROWS = pa.schema(
    [
        *_PICTURE,
        pa.field("sha256", pa.string()),  # of the encoded bytes, hexadecimal
        pa.field("caption", pa.string()),
        pa.field("log_prob", pa.float32()),  # natural logarithm, summed over the words and <end>
        pa.field(
            "alternatives",
            pa.list_(pa.struct([("caption", pa.string()), ("log_prob", pa.float32())])),
        ),
        *_ERROR,
    ]
)
THUMBNAIL = pa.field("thumbnail", pa.binary())  # JPEG


def column_name(column: Column, view: str) -> str:
    """Name of the feature column of a view (``images.views.view_names``), "" for the image itself."""
    return f"{column}{view}"


def feature_rows(
    shape: FeatureShape, *, grid: bool, views: Sequence[str] = (), thumbnails: bool = True
) -> pa.Schema:
    """Schema of ``features/*.parquet``.

    ``pooled`` is float32 [C], ``grid`` float16 [P, C] with its cells in row-major order; those of other views of the
    image have these ``views`` (``images.views.view_names``) after their names.
    """
    own = [pa.field("pooled", pa.fixed_shape_tensor(pa.float32(), shape.of("pooled")))]
    if grid:
        own.append(pa.field("grid", pa.fixed_shape_tensor(pa.float16(), shape.of("grid"))))
    seen = [field.with_name(f"{field.name}{view}") for view in views for field in own]
    head = [*_PICTURE, pa.field("sha256", pa.string())]  # of the encoded bytes, hexadecimal
    return pa.schema([*head, *[THUMBNAIL] * thumbnails, *own, *seen, *_ERROR])
