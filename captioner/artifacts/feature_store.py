"""Reads a published feature store."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
from pydantic import ValidationError

from captioner import storage
from captioner.artifacts.output import MANIFEST
from captioner.artifacts.schema import GRID_CELLS, SCHEMA_VERSION, SPLITS, StoreManifest
from captioner.errors import StoreError

ENCODER_WEIGHTS = "encoder.safetensors"

# Captions read at a time where not all of them are wanted in memory.
_CAPTIONS = 2**18

Integers = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class FeatureTable:
    """Features of one split, in the order of their ids."""

    image_ids: list[str]
    columns: dict[str, np.ndarray[Any, Any]]
    """``pooled`` float32 [N, C] and ``grid`` float16 [N, P, C], as asked for."""


@dataclass(frozen=True)
class Chunk:
    """Good images of a split that lie together in a store's files."""

    split: str
    files: tuple[str, ...]
    rows: Integers
    """The images' places in the split, in the order of ids."""


class FeatureStore:
    """A feature store opened through its manifest."""

    def __init__(self, uri: str, manifest: StoreManifest):
        self.uri = uri
        self.manifest = manifest

    @classmethod
    def open(cls, uri: str) -> "FeatureStore":
        """Open a store.

        Raises:
            StoreError: there is no manifest (nothing was published), or this version cannot read it.
        """
        uri = storage.absolute(uri)
        manifest_uri = storage.join(uri, MANIFEST)
        if not storage.exists(manifest_uri):
            raise StoreError(f"{uri} is not a feature store: it has no {MANIFEST}")
        raw = storage.read_json(manifest_uri)
        if not isinstance(raw, dict) or raw.get("kind") != "features":
            kind = raw.get("kind") if isinstance(raw, dict) else None
            raise StoreError(f"{uri} is not a feature store: its manifest says {kind!r}")
        if raw.get("schema_version") != SCHEMA_VERSION:
            raise StoreError(
                f"{uri} has schema version {raw.get('schema_version')}, this release reads {SCHEMA_VERSION}"
            )
        try:
            return cls(uri, StoreManifest.model_validate(raw))
        except ValidationError as error:
            raise StoreError(f"{manifest_uri} is damaged: {error.errors()[0]['msg']}") from error

    @property
    def encoder_weights_uri(self) -> str:
        """The weights every embedding of the store was made with."""
        return storage.join(self.uri, ENCODER_WEIGHTS)

    def require(
        self,
        split: str,
        columns: tuple[str, ...],
        *,
        captions: bool,
        mirrored: bool = False,
        crops: int = 0,
    ) -> None:
        """Check that the split, the feature columns and, if asked for, captions and other views are there.

        Raises:
            StoreError: something is missing; the message says how to get it.
        """
        counts = self.manifest.splits.get(split)
        if split not in SPLITS or counts is None or counts.ok == 0:
            there = ", ".join(name for name, found in self.manifest.splits.items() if found.ok)
            raise StoreError(
                f"{self.uri} has no images in split {split!r}; it has: {there or 'none'}"
            )
        if any(name.startswith("grid") for name in columns) and not self.manifest.grid:
            raise StoreError(f"{self.uri} holds no grid: extract with --grid for this decoder")
        if mirrored and not self.manifest.mirrored:
            raise StoreError(f"{self.uri} holds no mirrored images: extract with --mirrored")
        if crops and self.manifest.mirrored and not mirrored:
            raise StoreError(
                f"{self.uri} holds crops that are mirrored in part: train with --mirrored"
            )
        if crops > self.manifest.crops:
            raise StoreError(
                f"{self.uri} holds {self.manifest.crops} crops of each image: extract with --crops {crops}"
            )
        if captions and counts.captions == 0:
            raise self._no_captions(split)

    def _no_captions(self, split: str) -> StoreError:
        return StoreError(f"{self.uri} has no captions in split {split!r}")

    def load(
        self, split: str, columns: tuple[str, ...], folder: Path | None = None
    ) -> FeatureTable:
        """Load columns of all good images of a split, ordered by image id.

        Args:
            folder: where to put them into files that are mapped to memory; None: in memory.

        Raises:
            StoreError: the split or a column is missing, or the files are not those of the manifest.
        """
        self.require(split, columns, captions=False)
        dataset = self._dataset("features")
        good = (pads.field("split") == split) & pads.field("error").is_null()
        ids = dataset.to_table(columns=["image_id"], filter=good)["image_id"].to_numpy()
        if len(ids) != self.manifest.splits[split].ok:
            raise StoreError(
                f"{self.uri} is damaged: {len(ids)} images in split {split!r}, "
                f"{self.manifest.splits[split].ok} in the manifest"
            )
        order = np.argsort(ids, kind="stable")
        position = np.empty_like(order)
        position[order] = np.arange(len(order))
        arrays: dict[str, np.ndarray[Any, Any]] = {}
        for name in columns:
            kind = dataset.schema.field(name).type
            shape, dtype = (len(ids), *kind.shape), kind.value_type.to_pandas_dtype()
            arrays[name] = (
                np.empty(shape, dtype)
                if folder is None
                else np.lib.format.open_memmap(folder / f"{split}-{name}.npy", "w+", dtype, shape)
            )
            start = 0
            # Filled batch by batch: a grid is large, and a second copy of it would not fit beside the first.
            for batch in dataset.to_batches(columns=[name], filter=good, batch_size=256):
                rows = batch.column(0).to_numpy_ndarray()
                arrays[name][position[start : start + len(rows)]] = rows
                start += len(rows)
        return FeatureTable([str(name) for name in ids[order]], arrays)

    def chunks(self, split: str, images: int) -> list["Chunk"]:
        """A split in pieces of whole files with about ``images`` good images each."""
        good = (pads.field("split") == split) & pads.field("error").is_null()
        found = self._dataset("features").to_table(columns=["image_id", "__filename"], filter=good)
        ids = found["image_id"].to_numpy()
        rows = np.empty(len(ids), np.int64)
        rows[np.argsort(ids, kind="stable")] = np.arange(len(ids))
        names = found["__filename"].to_numpy()
        first = np.r_[True, names[1:] != names[:-1]] if len(names) else np.zeros(0, bool)
        starts = np.flatnonzero(first)
        chunks: list[Chunk] = []
        for start, end in zip(starts, [*starts[1:], len(names)], strict=True):
            if chunks and len(chunks[-1].rows) + end - start <= images:
                last = chunks.pop()
                files, part = (*last.files, names[start]), np.r_[last.rows, rows[start:end]]
            else:
                files, part = (names[start],), rows[start:end]
            chunks.append(Chunk(split, files, part))
        return chunks

    def column_bytes(self, column: str) -> int:
        """Bytes of one image in a feature column."""
        channels = self.manifest.encoder.channels
        return 4 * channels if column.startswith("pooled") else 2 * GRID_CELLS * channels

    def read_chunk(
        self, chunk: "Chunk", columns: tuple[str, ...]
    ) -> dict[str, np.ndarray[Any, Any]]:
        """Columns of a chunk's images, in the order of its ``rows``."""
        filesystem, _ = storage.resolve(self.uri)
        good = (pads.field("split") == chunk.split) & pads.field("error").is_null()
        dataset = pads.dataset(list(chunk.files), filesystem=filesystem, format="parquet")
        table = dataset.to_table(columns=list(columns), filter=good)
        return {
            name: np.concatenate([piece.to_numpy_ndarray() for piece in table[name].chunks])
            for name in columns
        }

    def captions(self, split: str) -> dict[str, list[str]]:
        """Raw captions of the good images of a split, by image id (sorted), in their original order.

        Raises:
            StoreError: the split is missing or has no captions.
        """
        self.require(split, (), captions=True)
        good = (pads.field("split") == split) & pads.field("error").is_null()
        ids = self._dataset("features").to_table(columns=["image_id"], filter=good)["image_id"]
        found = self._dataset("captions").to_table(filter=pads.field("image_id").isin(ids.unique()))
        found = found.take(
            pc.sort_indices(found, [("image_id", "ascending"), ("index", "ascending")])
        )
        if not len(found):
            raise self._no_captions(split)
        grouped: dict[str, list[str]] = {}
        for name, caption in zip(
            found["image_id"].to_pylist(), found["caption"].to_pylist(), strict=True
        ):
            grouped.setdefault(name, []).append(caption)
        return grouped

    def caption_batches(self, split: str) -> Iterator[tuple[Integers, Integers, list[str]]]:
        """The captions that ``captions`` returns, as they lie in the files, some at a time.

        Yields:
            int64 [N], each caption's image: its row in the split, in the order of ids; int64 [N], the caption's place
            among those of its image; the N captions.

        Raises:
            StoreError: the split is missing or has no captions.
        """
        self.require(split, (), captions=True)
        good = (pads.field("split") == split) & pads.field("error").is_null()
        ids = self._dataset("features").to_table(columns=["image_id"], filter=good)["image_id"]
        ids = ids.take(pc.sort_indices(ids)).combine_chunks()
        dataset, found = self._dataset("captions"), 0
        for batch in dataset.to_batches(["image_id", "index", "caption"], batch_size=_CAPTIONS):
            table = pa.table(batch).append_column("row", pc.index_in(batch["image_id"], ids))
            table = table.filter(table["row"].is_valid())
            found += len(table)
            yield (
                table["row"].to_numpy().astype(np.int64),
                table["index"].to_numpy().astype(np.int64),
                table["caption"].to_pylist(),
            )
        if not found:
            raise self._no_captions(split)

    def image_uris(self, split: str) -> dict[str, str]:
        """Where each good image of a split came from, by image id (sorted)."""
        good = (pads.field("split") == split) & pads.field("error").is_null()
        rows = self._dataset("features").to_table(columns=["image_id", "uri"], filter=good)
        return dict(sorted(zip(rows["image_id"].to_pylist(), rows["uri"].to_pylist(), strict=True)))

    def _dataset(self, directory: str) -> pads.Dataset:
        filesystem, path = storage.resolve(self.uri)
        # Only the manifest's files: anything else in the directory was never published.
        files = [
            f"{path}/{entry.path}"
            for entry in self.manifest.files
            if entry.path.startswith(f"{directory}/") and entry.rows
        ]
        try:
            return pads.dataset(files, filesystem=filesystem, format="parquet")
        except (OSError, pa.ArrowInvalid) as error:
            raise StoreError(f"{self.uri} is damaged: {' '.join(str(error).split())}") from error
