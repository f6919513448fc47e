"""Tiny feature stores written without an encoder, for tests of what reads them."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.numpy

from captioner.artifacts.manifests import (
    Counts,
    EncoderRecord,
    FileEntry,
    SourceIdentity,
    SplitCounts,
    StoreManifest,
)
from captioner.artifacts.tables import CAPTION_ROWS, feature_rows
from captioner.encoders.spec import EncoderSpec
from captioner.encoders.weights import ENCODER_WEIGHTS
from captioner.images.views import MIRRORED, view_names
from tests.pictures import picture

CHANNELS = 6
GRID = (7, 7)
ANIMALS = ("cat", "dog", "horse", "cow", "duck", "frog")
ENDINGS = ("", "runs", "sleeps in the sun", "and a man walk over the wide green field")


def caption(kind: int, ending: int) -> str:
    """``A dog runs.`` and the like: the animal can be told from the features, the ending cannot."""
    return f"A {ANIMALS[kind]} {ENDINGS[ending]}".rstrip() + "."


def write_store(
    root: Path,
    images: dict[str, int],
    *,
    grid: bool = False,
    mirrored: bool = False,
    crops: int = 0,
    captions_per_image: int = 3,
    uncaptioned: int = 0,
    files: int = 1,
    seed: int = 0,
) -> str:
    """A published store of ``images`` pictures per split, and one rejected picture in each, spread over ``files``.

    The rejected picture has a caption that is not counted.

    The last ``uncaptioned`` pictures of each split, by id, have no captions.

    The pooled vector of a picture is large in the channel of its animal; the grid repeats it in every cell. The mirror
    image of a picture has its negative, its first crop twice the vector, its second thrice and so on.
    """
    generator = np.random.default_rng(seed)
    (root / "features").mkdir(parents=True)
    (root / "captions").mkdir()
    rows: list[dict[str, Any]] = []
    captions: list[dict[str, Any]] = []
    for split, count in images.items():
        # Ids against the order of writing: readers sort, and must carry the features along.
        for number in reversed(range(count)):
            kind = number % CHANNELS
            vector = generator.normal(0, 0.1, CHANNELS).astype(np.float32)
            vector[kind] += 1 + kind
            name = f"{split}-{number:04d}"
            rows.append({"image_id": name, "pooled": vector, "error": None})
            if number >= count - uncaptioned:
                captions.append({"image_id": name, "split": split, "caption": None, "index": None})
                continue
            endings = generator.integers(len(ENDINGS), size=captions_per_image)
            captions += [
                {
                    "image_id": name,
                    "split": split,
                    "caption": caption(kind, ending),
                    "index": index,
                }
                for index, ending in enumerate(endings)
            ]
        bad = f"{split}-bad"
        rows.append({"image_id": bad, "pooled": None, "error": "truncated"})
        captions.append({"image_id": bad, "split": split, "caption": "Not seen.", "index": 0})
    views = view_names(mirrored, crops)
    schema = feature_rows(encoder_spec().shape, grid=grid, views=views)
    nothing = [None] * len(rows)
    thumbnails = [None if row["error"] else picture(0, size=(24, 18)) for row in rows]
    columns = {
        "image_id": pa.array([row["image_id"] for row in rows]),
        "uri": pa.array([f"memory://{row['image_id']}" for row in rows]),
        "pooled": _tensors([row["pooled"] for row in rows], schema.field("pooled").type),
        "size": pa.array([1] * len(rows), pa.int64()),
        "mtime": pa.array(nothing, schema.field("mtime").type),
        "sha256": pa.array(nothing, pa.string()),
        "thumbnail": pa.array(thumbnails, pa.binary()),
        "error": pa.array([row["error"] for row in rows], pa.string()),
        "error_kind": pa.array([row["error"] and "final" for row in rows], pa.string()),
    }
    if grid:
        cells = [
            None if row["pooled"] is None else np.tile(row["pooled"], GRID[0] * GRID[1])
            for row in rows
        ]
        columns["grid"] = _tensors(cells, schema.field("grid").type)
    for view in views:
        factor = -1 if view == MIRRORED else 1 + int(view.removeprefix("_crop"))
        for name in ("pooled", "grid") if grid else ("pooled",):
            kind = columns[name].type
            values = [
                None if one is None else factor * np.asarray(one)
                for one in columns[name].storage.to_pylist()
            ]
            columns[f"{name}{view}"] = _tensors(values, kind)
    table = pa.table([columns[name] for name in schema.names], schema)
    bounds = [len(rows) * number // files for number in range(files + 1)]
    entries = []
    for number, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        path = root / f"features/{number}.parquet"
        pq.write_table(table.slice(start, end - start), path, write_page_checksum=True)
        entries.append(_entry(root, path, end - start))
    # In two files, and in no order.
    generator.shuffle(captions)
    for number, part in enumerate((captions[::2], captions[1::2])):
        path = root / f"captions/{number}.parquet"
        pq.write_table(pa.Table.from_pylist(part, CAPTION_ROWS), path, write_page_checksum=True)
        entries.append(_entry(root, path, len(part)))
    weights = root / ENCODER_WEIGHTS
    safetensors.numpy.save_file({"weight": np.ones(3, np.float32)}, weights)
    entries.append(_entry(root, weights))
    splits = {
        split: SplitCounts(images=count, captions=(count - uncaptioned) * captions_per_image)
        for split, count in images.items()
    }
    manifest = StoreManifest(
        encoder=EncoderRecord(spec=encoder_spec(), weights="random(seed=0)"),
        source=SourceIdentity(kind="test", uri="memory://"),
        grid=grid,
        mirrored=mirrored,
        crops=crops,
        counts=Counts(ok=sum(images.values()), rejected=len(images), unreadable=0),
        splits=splits,
        files=entries,
    )
    (root / "manifest.json").write_text(manifest.model_dump_json())
    return str(root)


def encoder_spec() -> EncoderSpec:
    return EncoderSpec(
        family="resnet50",
        name="resnet50",
        layer="layer4",
        input_size=(224, 224),
        resize="squash",
        filter="bilinear",
        mean=(0.0, 0.0, 0.0),
        deviation=(1.0, 1.0, 1.0),
        pooled_channels=CHANNELS,
        grid_channels=CHANNELS,
        grid=GRID,
        precision="float32",
        weights_sha256="0" * 64,
    )


def _entry(root: Path, path: Path, rows: int | None = None) -> FileEntry:
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    return FileEntry(path=str(path.relative_to(root)), bytes=len(data), rows=rows, sha256=digest)


def _tensors(values: list[Any], kind: pa.FixedShapeTensorType) -> pa.Array:
    lists = [
        None if value is None else value.astype(kind.value_type.to_pandas_dtype())
        for value in values
    ]
    storage = pa.array(lists, pa.list_(kind.value_type, kind.storage_type.list_size))
    return pa.ExtensionArray.from_storage(kind, storage)
