"""The pictures of a store that are most like one: exact, by the cosine of pooled vectors, some rows at a time."""

import hashlib
import io
import posixpath
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from captioner import storage
from captioner.artifacts.feature_store import FeatureStore
from captioner.artifacts.manifests import LikenessManifest
from captioner.artifacts.output import Output, publish_once
from captioner.config import SearchConfig
from captioner.encoders.encoder import Encoder
from captioner.errors import ImageError
from captioner.images.load import load_image
from captioner.plots import Captioned, caption_grids

NEIGHBOURS, GRID = "neighbours.parquet", "grid.png"
# On the sheet.
_SHOWN = 100
_COLUMNS = ("image_id", "uri", "pooled", "error")


@dataclass(frozen=True)
class Alike:
    """The images most like one."""

    rows: pa.Table
    """image_id, uri and cosine (float32) of each, the likest first, ids in order where two are as like."""
    uri: str
    """Where they are published."""
    manifest: LikenessManifest


def find_alike(config: SearchConfig) -> Alike:
    """Publish ``neighbours.parquet``, the ``k`` images most like ``config.image``, and a sheet of thumbnails.

    Raises:
        StoreError: the store is unusable, the picture cannot be read, or the output belongs to another search.
        ImageError: it is no picture.
    """
    store = FeatureStore.open(config.features)
    data = storage.read_bytes(config.image)
    pixels = _load(store, data, config)
    identity = {
        "job": "search",
        "features": store.identity(),
        "image": hashlib.sha256(data).hexdigest(),
        "k": config.k,
    }
    place = config.output or _default_place(config, identity)

    def fill(output: Output) -> LikenessManifest:
        found = _nearest(store, _embed(store, pixels), config.k)
        table = io.BytesIO()
        pq.write_table(found, table)
        files = [output.write(NEIGHBOURS, table.getvalue())]
        rows = found.to_pylist()
        shown = rows[:_SHOWN]
        small = store.thumbnails([row["image_id"] for row in shown])
        cells = [
            Captioned(
                row["image_id"],
                small.get(row["image_id"]),
                f"{row['cosine']:.3f}",
                note=row["image_id"],
            )
            for row in shown
        ]
        if cells:
            files.append(output.write(GRID, caption_grids({"": cells}, columns=5)))
        return LikenessManifest(
            features=store.uri, image=config.image, images=len(rows), files=files
        )

    manifest = publish_once(place, identity, LikenessManifest, fill, restart=config.restart)
    with storage.open_input(storage.join(storage.absolute(place), NEIGHBOURS)) as file:
        return Alike(pq.read_table(file), place, manifest)


def _default_place(config: SearchConfig, identity: dict[str, object]) -> str:
    stem = posixpath.splitext(posixpath.basename(storage.absolute(config.image)))[0]
    digest = hashlib.sha256(repr(identity).encode()).hexdigest()[:8]
    return f"runs/search/{stem}-{digest}"


def _load(store: FeatureStore, data: bytes, config: SearchConfig) -> np.ndarray[Any, Any]:
    """The pixels of the one picture, as the store's encoder takes them."""
    try:
        return load_image(data, store.manifest.encoder.spec.fit, config.limits).pixels[np.newaxis]
    except ImageError as error:
        raise type(error)(f"{config.image}: {error}") from error


def _embed(store: FeatureStore, pixels: np.ndarray[Any, Any]) -> torch.Tensor:
    """Float32 [C], of length 1."""
    encoder = Encoder.load(store.encoder_weights_uri, store.manifest.encoder.spec)
    pooled, _ = encoder(pixels, grid=False)
    return torch.nn.functional.normalize(pooled[0].float(), dim=0)


def _nearest(store: FeatureStore, query: torch.Tensor, k: int) -> pa.Table:
    best = pa.table(
        {
            "image_id": pa.array([], pa.string()),
            "uri": pa.array([], pa.string()),
            "cosine": pa.array([], pa.float32()),
        }
    )
    for rows in store.batches(_COLUMNS):
        good = rows.filter(pc.is_null(rows["error"]))
        if not len(good):
            continue
        # A copy: torch wants to be allowed to write.
        vectors = torch.tensor(good["pooled"].combine_chunks().to_numpy_ndarray())
        cosines = torch.nn.functional.normalize(vectors, dim=1) @ query
        new = good.select(["image_id", "uri"]).append_column("cosine", pa.array(cosines.numpy()))
        ranked = pa.concat_tables([best, new.cast(best.schema)])
        best = ranked.sort_by([("cosine", "descending"), ("image_id", "ascending")]).slice(0, k)
    return best
