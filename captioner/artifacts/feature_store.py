"""Reads a published feature store: features of the pictures of a split, in the order of their ids, and captions."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import torch
from torch import Tensor

from captioner import storage
from captioner.artifacts.id_set import IdRows, IdSet
from captioner.artifacts.manifests import FileEntry, StoreManifest, open_manifest
from captioner.artifacts.tables import SPLITS, THUMBNAIL
from captioner.encoders.weights import ENCODER_WEIGHTS
from captioner.errors import StoreError

if TYPE_CHECKING:
    import pandas as pd

# Rows read at a time where not all of them are wanted in memory.
_CAPTIONS, _FEATURES, _ROWS = 2**16, 256, 2**12
_READERS = 16

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

    files: tuple[str, ...]
    """URIs."""
    places: tuple[Integers, ...]
    """For each file int64 [its rows]: each row's place in the split, in the order of ids; -1 for rows of no concern."""

    @cached_property
    def rows(self) -> Integers:
        """The places of the chunk's images in the split, in the order they are read."""
        return np.concatenate([place[place >= 0] for place in self.places])

    def read(self, columns: Sequence[str]) -> dict[str, np.ndarray[Any, Any]]:
        """Columns of the chunk's images, in the order of ``rows``; ``image_id`` may be among them."""
        pieces = [found for _, found in self.batches(columns)]
        return {name: np.concatenate([piece[name] for piece in pieces]) for name in columns}

    def batches(
        self, columns: Sequence[str]
    ) -> Iterator[tuple[Integers, dict[str, np.ndarray[Any, Any]]]]:
        """Places in the split and columns of the chunk's images, some at a time.

        Raises:
            StoreError: a file is missing or damaged.
        """
        for file, place in zip(self.files, self.places, strict=True):
            start = 0
            for batch in _batches(file, columns):
                part = place[start : start + len(batch)]
                start += len(batch)
                taken = np.flatnonzero(part >= 0)
                if len(taken):
                    found = {name: _take(batch[name], taken) for name in columns}
                    yield part[taken], found


class FeatureStore:
    """A feature store opened through its manifest."""

    def __init__(self, uri: str, manifest: StoreManifest):
        self.uri = uri
        self.manifest = manifest
        self._located: dict[str, tuple[pa.Array, IdRows, Chunk]] = {}

    @classmethod
    def open(cls, uri: str) -> "FeatureStore":
        """Open a store.

        Raises:
            StoreError: there is no manifest (nothing was published), or this version cannot read it.
        """
        uri = storage.absolute(uri)
        return cls(uri, open_manifest(uri, StoreManifest))

    def identity(self) -> dict[str, Any]:
        """What a run that reads the store compares when it continues: other features or captions, another run."""
        captions = [entry.sha256 for entry in self._files("captions")]
        removed = self.manifest.removed
        return {
            "encoder": self.manifest.encoder.spec.model_dump(mode="json"),
            "source": self.manifest.source.model_dump(mode="json"),
            "captions": captions,
            "removed": removed and removed.sha256,
        }

    @property
    def encoder_weights_uri(self) -> str:
        """The weights every embedding of the store was made with; of one that was extended, the first part's."""
        return self._encoder_weights.uri(self.uri)

    def read_encoder_weights(self) -> bytes:
        """The file behind ``encoder_weights_uri``.

        Raises:
            StoreError: it is missing, or another than was published.
        """
        entry = self._encoder_weights
        data = storage.read_bytes(entry.uri(self.uri))
        if entry.sha256 != hashlib.sha256(data).hexdigest():
            raise StoreError(f"{entry.uri(self.uri)} is damaged: not the file that was published")
        return data

    @property
    def encoder_weights_entry(self) -> FileEntry:
        """The file, for the manifest of a store elsewhere."""
        return self._encoder_weights.model_copy(update={"path": self.encoder_weights_uri})

    @property
    def _encoder_weights(self) -> FileEntry:
        for entry in self.manifest.files:
            if entry.path.rpartition("/")[2] == ENCODER_WEIGHTS:
                return entry
        raise StoreError(f"{self.uri}: its manifest lists no {ENCODER_WEIGHTS}")

    def require(
        self,
        split: str,
        columns: Sequence[str],
        *,
        captions: bool,
        mirrored: bool = False,
        crops: int = 0,
    ) -> None:
        """Check that the split, the feature columns and, if asked for, captions and other views are there.

        Raises:
            StoreError: something is missing; the message says how to get it.
        """
        manifest = self.manifest
        counts = manifest.splits.get(split)
        if split not in SPLITS or counts is None:
            there = ", ".join(manifest.splits) or "none"
            raise StoreError(f"{self.uri} has no images in split {split!r}; it has: {there}")
        if "grid" in columns and not manifest.grid:
            raise StoreError(f"{self.uri} holds no grid: extract with --grid for this decoder")
        if mirrored and not manifest.mirrored:
            raise StoreError(f"{self.uri} holds no mirrored images: extract with --mirrored")
        if crops and manifest.mirrored and not mirrored:
            raise StoreError(
                f"{self.uri} holds crops that are mirrored in part: train with --mirrored"
            )
        if crops > manifest.crops:
            raise StoreError(
                f"{self.uri} holds {manifest.crops} crops of each image: extract with --crops {crops}"
            )
        if captions and counts.captions == 0:
            raise self._no_captions(split)

    def image_ids(self, split: str) -> list[str]:
        """Ids of the good images of a split, sorted."""
        ids: list[str] = self._locate(split)[0].to_pylist()
        return ids

    def load(self, split: str, columns: Sequence[str]) -> FeatureTable:
        """Load columns of all good images of a split into memory, ordered by image id.

        Raises:
            StoreError: the split or a column is missing, or the files are not those of the manifest.
        """
        self.require(split, columns, captions=False)
        ids = self.image_ids(split)
        arrays: dict[str, np.ndarray[Any, Any]] = {}
        for name in columns:
            shape, dtype = self.layout(name)
            arrays[name] = np.empty((len(ids), *shape), dtype)
        self.fill(split, arrays)
        return FeatureTable(ids, arrays)

    def fill(self, split: str, arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Read columns of all good images of a split into arrays [N, ...] of their ``layout``, ordered by image id.

        Raises:
            StoreError: the files are not those of the manifest.
        """
        # Batch by batch: a grid is large, and a second copy of it would not fit beside the first.
        for places, found in self._locate(split)[-1].batches(list(arrays)):
            for name, values in found.items():
                arrays[name][places] = values

    def batches(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """The rows of all images that count, rejected ones too, as they lie in the files, some at a time.

        Args:
            columns: some of those of the files (``tables.feature_rows``); None: all.

        Raises:
            StoreError: a file is missing or damaged, or has no such column.
        """
        with storage.reading(self.uri):
            rows = _dataset([entry.uri(self.uri) for entry in self._files("features")])
            there = rows.schema.names
            wanted = list(there if columns is None else columns)
            if missing := sorted({*wanted} - {*there}):
                raise StoreError(
                    f"{self.uri} has no {', '.join(missing)}; it has {', '.join(there)}"
                )
            read = [*dict.fromkeys(["image_id", *wanted]), "__filename"]
            batches = rows.to_batches(read, batch_size=_ROWS)
        for batch in _checked(batches, self.uri):
            yield self._standing(pa.table(batch)).select(wanted)

    def to_arrow(self, columns: Sequence[str] | None = None) -> pa.Table:
        """``batches`` as one table, in memory.

        Raises:
            StoreError: as ``batches``.
        """
        return pa.concat_tables(self.batches(columns))

    def to_pandas(self, columns: Sequence[str] | None = None) -> "pd.DataFrame":
        """``to_arrow`` as a data frame; each embedding is an array, ``pooled`` [C] and ``grid`` [P, C].

        Raises:
            StoreError: as ``to_arrow``.
        """
        table = self.to_arrow(columns)
        tensors = [f.name for f in table.schema if isinstance(f.type, pa.FixedShapeTensorType)]
        frame = table.drop_columns(tensors).to_pandas()
        for name in tensors:
            values = [
                row.to_numpy() if row.is_valid else None
                for chunk in table[name].chunks
                for row in chunk
            ]
            frame.insert(table.schema.get_field_index(name), name, values)
        return frame

    def to_torch(self, split: str, columns: Sequence[str] = ("pooled",)) -> dict[str, Tensor]:
        """Features of the good images of a split, in the order of ``image_ids``: ``pooled`` float32 [N, C], ``grid``
        float16 [N, P, C].

        Raises:
            StoreError: as ``load``.
        """
        found = self.load(split, columns).columns
        return {name: torch.from_numpy(values) for name, values in found.items()}

    def chunks(self, split: str, images: int) -> list[Chunk]:
        """A split in pieces of whole files with about ``images`` good images each."""
        *_, whole = self._locate(split)
        chunks: list[Chunk] = []
        held = 0
        for file, place in zip(whole.files, whole.places, strict=True):
            count = int((place >= 0).sum())
            if not count:
                continue
            if chunks and held + count <= images:
                last = chunks.pop()
                chunks.append(Chunk((*last.files, file), (*last.places, place)))
                held += count
            else:
                chunks.append(Chunk((file,), (place,)))
                held = count
        return chunks

    def column_bytes(self, column: str) -> int:
        """Bytes of one image in a feature column."""
        shape, dtype = self.layout(column)
        return int(np.prod(shape)) * np.dtype(dtype).itemsize

    def thumbnails(self, ids: Sequence[str]) -> dict[str, bytes]:
        """Small JPEGs of some images, by id; those without one are left out."""
        if not self.manifest.thumbnails or not ids:
            return {}
        wanted = pads.field("image_id").isin(list(ids))
        files = [entry.uri(self.uri) for entry in self._files("features")]
        columns = ["image_id", THUMBNAIL.name, "__filename"]
        with storage.reading(self.uri):
            rows = _dataset(files).to_table(columns=columns, filter=wanted)
        return {
            row["image_id"]: row[THUMBNAIL.name]
            for row in self._standing(rows).to_pylist()
            if row[THUMBNAIL.name]
        }

    def captions(self, split: str) -> dict[str, list[str]]:
        """Raw captions of the good images of a split, by image id (sorted), in their original order; images without any
        are left out.

        Raises:
            StoreError: the split is missing or has no captions.
        """
        ids = self._locate(split)[0]
        found: list[tuple[int, int, str]] = []
        for rows, indices, texts in self.caption_batches(split):
            found += zip(rows.tolist(), indices.tolist(), texts, strict=True)
        grouped: dict[str, list[str]] = {}
        for row, _, text in sorted(found):
            grouped.setdefault(ids[row].as_py(), []).append(text)
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
        rows_of = self._locate(split)[1]
        there = (pads.field("split") == split) & pads.field("caption").is_valid()
        columns, found = ["image_id", "index", "caption", "__filename"], 0
        with storage.reading(self.uri):
            batches = self._captions().to_batches(columns, filter=there, batch_size=_CAPTIONS)
        for batch in _checked(batches, self.uri):
            table = self._standing(pa.table(batch))
            rows = rows_of.find(table["image_id"].to_pylist())
            table = table.filter(pa.array(rows >= 0))
            found += len(table)
            yield (
                rows[rows >= 0],
                table["index"].to_numpy().astype(np.int64),
                table["caption"].to_pylist(),
            )
        if not found:
            raise self._no_captions(split)

    def _no_captions(self, split: str) -> StoreError:
        return StoreError(f"{self.uri} has no captions in split {split!r}")

    def _locate(self, split: str) -> tuple[pa.Array, IdRows, Chunk]:
        """Sorted ids of a split's good images, where each stands among them, and where they lie."""
        if split not in self._located:
            self._located[split] = self._find(split)
        return self._located[split]

    def _find(self, split: str) -> tuple[pa.Array, IdRows, Chunk]:
        self.require(split, (), captions=False)
        of_split = pads.field("split") == split
        columns = ["image_id", "__filename"]
        with storage.reading(self.uri):
            mine = self._captions().to_batches(columns, filter=of_split, batch_size=_CAPTIONS)
        members = IdSet(
            self._standing(pa.table(batch))["image_id"].unique().to_pylist()
            for batch in _checked(mine, self.uri)
        )
        removed = self._removed_rows
        entries = self._files("features")
        names: list[pa.Array] = []
        # On an object store each is a round trip or two.
        with ThreadPoolExecutor(_READERS) as pool:
            for start in range(0, len(entries), _READERS):
                some = entries[start : start + _READERS]
                tables = pool.map(lambda entry: self._read(entry, ["image_id", "error"]), some)
                for entry, rows in zip(some, tables, strict=True):
                    ids = rows["image_id"].cast(pa.large_string()).combine_chunks()
                    good = pc.and_(
                        rows["error"].is_null(), pa.array(members.holds(ids.to_pylist()))
                    )
                    if entry.path in removed:
                        gone = pc.is_in(ids, removed[entry.path].cast(pa.large_string()))
                        good = pc.and_(good, pc.invert(gone))
                    # Null: of no concern.
                    names.append(pc.if_else(good, ids, None).combine_chunks())
        # Large, for all of them together may be more than 2 GiB.
        ids = pa.chunked_array(names, pa.large_string()).drop_null()
        ids = ids.take(pc.sort_indices(ids)).combine_chunks()
        rows_of = IdRows(_in_parts(ids))
        expected = self.manifest.splits[split].images
        unique = len(ids) - int(pc.sum(pc.equal(ids[1:], ids[:-1])).as_py() or 0)
        if not len(ids) == unique == expected:
            raise StoreError(
                f"{self.uri} is damaged: {len(ids)} rows of {unique} images in split {split!r}, "
                f"{expected} in the manifest"
            )
        places = []
        while names:
            each = names.pop(0)
            place = np.full(len(each), -1, np.int64)
            there = each.is_valid().to_numpy(zero_copy_only=False)
            place[there] = rows_of.find(each.drop_null().to_pylist())
            places.append(place)
        files = tuple(entry.uri(self.uri) for entry in entries)
        return ids, rows_of, Chunk(files, tuple(places))

    @cached_property
    def _removed_rows(self) -> dict[str, pa.Array]:
        entry = self.manifest.removed
        if entry is None:
            return {}
        table = self._read(entry, ["file", "image_id"])
        return {
            file: table.filter(pc.equal(table["file"], file))["image_id"].combine_chunks()
            for file in table["file"].unique().to_pylist()
        }

    def _standing(self, rows: pa.Table) -> pa.Table:
        """Rows, with the path of the file each is from in ``__filename``, without those that no longer count."""
        for file, names in self._removed_rows.items():
            _, path = storage.resolve(FileEntry(path=file, bytes=0).uri(self.uri))
            gone = pc.and_(pc.equal(rows["__filename"], path), pc.is_in(rows["image_id"], names))
            rows = rows.filter(pc.invert(gone))
        return rows

    def _read(self, entry: FileEntry, columns: list[str]) -> pa.Table:
        uri = entry.uri(self.uri)
        with storage.reading(uri), storage.open_input(uri) as handle:
            return pq.read_table(handle, columns=columns, page_checksum_verification=True)

    def layout(self, column: str) -> tuple[tuple[int, ...], type]:
        """Shape and dtype of one image's values in a feature column of any view."""
        kind = column.partition("_")[0]
        dtype = np.float32 if kind == "pooled" else np.float16
        return self.manifest.encoder.spec.shape.of(kind), dtype

    def _files(self, directory: str) -> list[FileEntry]:
        # Only the manifest's files: anything else in the directory was never published.
        return self.manifest.tables(directory)

    def _captions(self) -> pads.Dataset:
        return _dataset([entry.uri(self.uri) for entry in self._files("captions")])


def _in_parts(ids: pa.Array) -> Iterator[list[str]]:
    for start in range(0, len(ids), _CAPTIONS):
        yield ids[start : start + _CAPTIONS].to_pylist()


def _checked(batches: Iterator[pa.RecordBatch], what: str) -> Iterator[pa.RecordBatch]:
    with storage.reading(what):
        yield from batches


def _dataset(uris: Sequence[str]) -> pads.Dataset:
    """Parquet files, on one file system or several, whose pages are checked when they are read."""
    checked = pads.ParquetFragmentScanOptions(page_checksum_verification=True)
    form = pads.ParquetFileFormat(default_fragment_scan_options=checked)
    by_root: dict[str, list[str]] = {}
    for uri in uris:
        scheme, colon, rest = uri.partition("://")
        by_root.setdefault(f"{scheme}://{rest.partition('/')[0]}" if colon else "", []).append(uri)
    parts = []
    for group in by_root.values():
        filesystem, _ = storage.resolve(group[0])
        paths = [storage.resolve(uri)[1] for uri in group]
        parts.append(pads.dataset(paths, filesystem=filesystem, format=form))
    return parts[0] if len(parts) == 1 else pads.dataset(parts)


def _batches(file: str, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    with storage.reading(file):
        yield from _dataset([file]).to_batches(columns=list(columns), batch_size=_FEATURES)


def _take(array: pa.Array, rows: Integers) -> np.ndarray[Any, Any]:
    if not isinstance(array, pa.FixedShapeTensorArray):
        return np.asarray(array.to_numpy(zero_copy_only=False))[rows]
    if len(rows) < len(array):  # the others may be null, which no numbers are
        array = pa.ExtensionArray.from_storage(array.type, array.storage.take(pa.array(rows)))
    values: np.ndarray[Any, Any] = array.to_numpy_ndarray()
    return values
