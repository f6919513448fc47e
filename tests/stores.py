"""Tiny feature stores written without an encoder, for tests of what reads them."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.numpy

from captioner.artifacts.feature_store import ENCODER_WEIGHTS
from captioner.artifacts.schema import (
    CAPTION_ROWS,
    GRID_CELLS,
    MIRRORED,
    EncoderIdentity,
    FileEntry,
    SourceIdentity,
    SplitCounts,
    StoreManifest,
    feature_rows,
    view_names,
)

CHANNELS = 6
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
            rows.append({"image_id": name, "split": split, "pooled": vector, "error": None})
            if number >= count - uncaptioned:
                continue
            endings = generator.integers(len(ENDINGS), size=captions_per_image)
            captions += [
                {"image_id": name, "caption": caption(kind, ending), "index": index}
                for index, ending in enumerate(endings)
            ]
        rows.append(
            {"image_id": f"{split}-bad", "split": split, "pooled": None, "error": "truncated"}
        )
        captions.append({"image_id": f"{split}-bad", "caption": "Not seen.", "index": 0})
    views = view_names(mirrored, crops)
    schema = feature_rows(CHANNELS, grid, views)
    columns = {
        "image_id": pa.array([row["image_id"] for row in rows]),
        "split": pa.array([row["split"] for row in rows]),
        "uri": pa.array([f"memory://{row['image_id']}" for row in rows]),
        "pooled": _tensors([row["pooled"] for row in rows], schema.field("pooled").type),
        "error": pa.array([row["error"] for row in rows], pa.string()),
    }
    if grid:
        cells = [
            None if row["pooled"] is None else np.tile(row["pooled"], GRID_CELLS) for row in rows
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
        entries.append(FileEntry(path=f"features/{number}.parquet", rows=end - start))
        pq.write_table(table.slice(start, end - start), root / entries[-1].path)
    # In two files, and in no order.
    generator.shuffle(captions)
    for number, part in enumerate((captions[::2], captions[1::2])):
        entries.append(FileEntry(path=f"captions/{number}.parquet", rows=len(part)))
        pq.write_table(pa.Table.from_pylist(part, CAPTION_ROWS), root / entries[-1].path)
    safetensors.numpy.save_file({"weight": np.ones(3, np.float32)}, root / ENCODER_WEIGHTS)
    splits = {
        split: SplitCounts(
            images=count + 1,
            ok=count,
            rejected=1,
            captions=(count - uncaptioned) * captions_per_image,
        )
        for split, count in images.items()
    }
    total = {
        field: sum(getattr(counts, field) for counts in splits.values())
        for field in SplitCounts.model_fields
    }
    manifest = StoreManifest(
        encoder=encoder_identity(),
        source=SourceIdentity(kind="test", uri="memory://"),
        grid=grid,
        mirrored=mirrored,
        crops=crops,
        total=SplitCounts(**total),
        splits=splits,
        files=entries,
    )
    (root / "manifest.json").write_text(manifest.model_dump_json())
    return str(root)


def encoder_identity() -> EncoderIdentity:
    return EncoderIdentity(
        name="resnet50",
        layer="layer4",
        weights="random(seed=0)",
        weights_sha256="0" * 64,
        preprocessing="imagenet",
        compute="float32",
        channels=CHANNELS,
    )


def _tensors(values: list[Any], kind: pa.FixedShapeTensorType) -> pa.Array:
    lists = [
        None if value is None else value.astype(kind.value_type.to_pandas_dtype())
        for value in values
    ]
    storage = pa.array(lists, pa.list_(kind.value_type, kind.storage_type.list_size))
    return pa.ExtensionArray.from_storage(kind, storage)
