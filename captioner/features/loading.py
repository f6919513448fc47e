"""The pipeline's first stage: rows of encoded pictures -> rows of what a stage loads from them, behind a fence."""

import hashlib
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray import cloudpickle

from captioner.artifacts.id_set import IdSet, content_key
from captioner.artifacts.tables import FINAL, UNCHANGED
from captioner.errors import ImageError
from captioner.features.stage import Stage
from captioner.images.fence import Fence


def load_rows(
    rows: pa.Table,
    stage: Stage,
    *,
    digests: bool = False,
    unchanged: "ray.ObjectRef[IdSet] | None" = None,
) -> pa.Table:
    """Replace ``bytes`` by what the stage loads from them; zeros and nulls where ``error`` says why there is nothing.

    Args:
        digests: add ``sha256``, of the bytes.
        unchanged: images with the content that a collection has of them (``content_key``): nothing is loaded of them.
    """
    errors, kinds = rows["error"].to_pylist(), rows["error_kind"].to_pylist()
    columns: dict[str, Any] = {}
    for field in stage.loaded:
        kind = field.type
        is_tensor = isinstance(kind, pa.FixedShapeTensorType)
        columns[field.name] = (
            np.zeros((len(rows), *kind.shape), kind.value_type.to_pandas_dtype())
            if is_tensor
            else [None] * len(rows)
        )
    hashes: list[str | None] = [None] * len(rows)
    if digests:
        for position, cell in enumerate(rows["bytes"]):
            if errors[position] is None:
                hashes[position] = hashlib.sha256(cell.as_buffer()).hexdigest()
    if unchanged is not None:
        keys = map(content_key, rows["image_id"].to_pylist(), hashes)
        for position in np.flatnonzero(ray.get(unchanged).holds(list(keys))).tolist():
            errors[position], kinds[position] = "as it was", UNCHANGED
    there = [position for position, error in enumerate(errors) if error is None]
    pictures = [rows["bytes"][position].as_buffer() for position in there]
    found = _fence(cloudpickle.dumps(stage.load), stage.loading_bytes).load(pictures)
    for position, one in zip(there, found, strict=True):
        if isinstance(one, ImageError):
            errors[position], kinds[position] = str(one), FINAL
            continue
        for name, value in one.items():
            columns[name][position] = value
    return pa.table(
        {
            **{name: rows[name] for name in ("image_id", "uri", "size", "mtime")},
            **({"sha256": pa.array(hashes, pa.string())} if digests else {}),
            **{
                field.name: pa.FixedShapeTensorArray.from_numpy_ndarray(columns[field.name])
                if isinstance(field.type, pa.FixedShapeTensorType)
                else pa.array(columns[field.name], field.type)
                for field in stage.loaded
            },
            "error": pa.array(errors, pa.string()),
            "error_kind": pa.array(kinds, pa.string()),
        }
    )


@lru_cache(1)
def _fence(load: bytes, memory: int) -> Fence:
    """That of this process, for as long as it loads for the same stage."""
    return Fence(load, memory=memory)
