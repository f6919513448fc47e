"""Tar shards of pictures with captions beside them, as webdataset and img2dataset write them; a task reads one each."""

import hashlib
import io
import posixpath
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import pyarrow as pa
from pyarrow.fs import FileSystem

from captioner import storage
from captioner.artifacts.id_set import NONE, IdSet
from captioner.artifacts.manifests import SourceIdentity
from captioner.artifacts.tables import CAPTION_ROWS, FINAL
from captioner.config import Split
from captioner.errors import SourceError
from captioner.sources.base import Listed
from captioner.sources.columns import NO_CAPTIONS
from captioner.sources.image_files import is_image
from captioner.sources.outage import RETRY_SECONDS, Outage, kind_of, of_place, reason_of
from captioner.sources.place import Place, suffix_of
from captioner.sources.shard_index import (
    Sample,
    index_shard,
    is_archive,
    is_picture,
    is_shard,
    open_tar,
    split_name,
    stem_of,
)
from captioner.sources.splits import hashed_split, split_in_name
from captioner.sources.tasks import Piece, PieceSource, source_rows, states
from captioner.storage.faults import one_line

_BYTES_PER_TABLE = 16 * 2**20
_CAPTIONS_PER_BATCH = 10_000
OPTIONS = frozenset(
    ("captions", "caption_columns", "id_column", "encoding", "partial", "exclude", "split", "limit")
)
"""Settings of ``SourceConfig`` that say something here."""


def open_place(place: Place) -> "ShardSource | None":
    """Tar files, or a directory of them.

    Raises:
        SourceError: the directory holds pictures, too.
    """
    if place.files is None:
        if not is_shard(place.uri):
            return None
        filesystem, path = storage.resolve(place.uri)
        with storage.reading(place.uri):
            info = filesystem.get_file_info(path)
        name = place.uri.rpartition("/")[2]
        one = storage.FileInfo(place.uri, name, info.size, info.mtime_ns)
        return ShardSource(place, [one], single=True)
    shards = place.taken("shards", is_shard)
    if not shards:
        return None
    place.check_unchanged(shards)
    images = [file for file in place.files if is_image(file.path)]
    if images and all(is_archive(file.path) for file in shards):
        return None  # what the images came in
    if images:
        raise SourceError(
            f"{place.spec}: holds both shards ({shards[0].path}, ...) and images ({images[0].path}, ...): give the "
            "folder of one kind, or leave one out with source-options.exclude"
        )
    return ShardSource(place, shards)


@dataclass(frozen=True)
class _Row:
    """A picture that is taken."""

    image_id: str
    sample: Sample
    split: Split


class ShardSource:
    """Tar shards; a picture's id is its shard's path without the suffix and its key, ``00012/000120034``.

    Splits come from the shards' names, as those of Parquet files do.
    """

    def __init__(self, place: Place, files: list[storage.FileInfo], *, single: bool = False):
        """
        Raises:
            SourceError: a shard or its captions cannot be read, or ids are missing or repeated.
        """
        self.uri = place.uri
        self.options = place.options
        self.limits = place.limits
        self._single = single
        if self.options.captions not in (None, NO_CAPTIONS):
            raise SourceError(f"source-options.captions: {self.uri} holds captions in its shards")
        tables = {file.path: file for file in place.files or ()}
        beside = [tables.get(f"{stem_of(file.path)}.parquet") for file in files]
        index = partial(index_shard, options=place.options, captions=place.captions)
        with ThreadPoolExecutor(16) as pool:
            self._shards = list(pool.map(index, files, beside))
        self._rows = self._choose()
        if place.beginning is not None:
            self._left_out = place.beginning.left_out
            return
        kinds = Counter(place.left_out)
        taken = {file.path for file in files}
        read = {table.path for table in beside if table}
        kinds.update(
            "captions file" if file.path in read else suffix_of(file.path)
            for file in place.files or ()
            if file.path not in taken
        )
        for shard in self._shards:
            kinds.update(shard.left_out)
        kinds["over the limit"] = sum(len(s.samples) for s in self._shards) - self.num_images()
        self._left_out = {kind: count for kind, count in kinds.most_common() if count}

    def identity(self) -> SourceIdentity:
        listing, captions = hashlib.sha256(), hashlib.sha256()
        for shard, rows in zip(self._shards, self._rows, strict=True):
            listing.update(f"{shard.file.path}:{shard.file.size}:{len(rows)};".encode())
            for row in rows:
                captions.update(f"{row.image_id}:{row.split}:{row.sample.captions};".encode())
        return SourceIdentity(
            kind="shards",
            uri=self.uri,
            options={"limit": self.options.limit, "id_column": self.options.id_column},
            listing=listing.hexdigest(),
            captions=captions.hexdigest(),
        )

    def files(self) -> Iterator[Listed]:
        for shard in () if self._single else self._shards:
            yield None, shard.file

    def states(self) -> Iterator[pa.RecordBatch]:
        for shard, rows in zip(self._shards, self._rows, strict=True):
            ids = [row.image_id for row in rows]
            yield states(ids, [None] * len(ids), [shard.file.mtime] * len(ids))

    def num_images(self) -> int:
        return sum(map(len, self._rows))

    def left_out(self) -> dict[str, int]:
        return dict(self._left_out)

    def images(self, done: IdSet = NONE, /, *, retry_seconds: float = RETRY_SECONDS) -> PieceSource:
        pieces = []
        for shard, rows in zip(self._shards, self._rows, strict=True):
            over = done.holds([row.image_id for row in rows])
            ids = {
                row.sample.key: row.image_id
                for row, finished in zip(rows, over, strict=True)
                if not finished
            }
            if ids:
                # Opened once and sent along: workers may lack the endpoint of an S3 store.
                filesystem, path = storage.resolve(shard.file.uri)
                bounds = (self.limits.max_bytes, retry_seconds)
                read = partial(_read, shard.file, filesystem, path, ids, *bounds)
                pieces.append(Piece(read, len(ids), shard.file.size * len(ids) // len(rows)))
        return PieceSource("Shards", pieces)

    def captions(self) -> Iterator[pa.RecordBatch]:
        found: list[dict[str, Any]] = []
        for rows in self._rows:
            for row in rows:
                head = {"image_id": row.image_id, "split": row.split}
                texts = enumerate(row.sample.captions)
                found += [{**head, "caption": text, "index": index} for index, text in texts] or [
                    {**head, "caption": None, "index": None}
                ]
                if len(found) >= _CAPTIONS_PER_BATCH:
                    yield pa.RecordBatch.from_pylist(found, CAPTION_ROWS)
                    found = []
        if found:
            yield pa.RecordBatch.from_pylist(found, CAPTION_ROWS)

    def _choose(self) -> list[list[_Row]]:
        """The pictures taken of each shard."""
        by_name = [split_in_name(shard.file.path) for shard in self._shards]
        other = self.options.split
        if other == "auto":
            if not any(sample.captions for shard in self._shards for sample in shard.samples):
                other = "test"
            elif any(by_name):
                other = "train"
        counts: Counter[Split] = Counter()
        seen: set[str] = set()
        chosen = []
        for shard, named in zip(self._shards, by_name, strict=True):
            rows = []
            for sample in shard.samples:
                image_id = sample.own_id or f"{shard.stem}/{sample.key}"
                if image_id in seen:
                    raise SourceError(
                        f"{shard.file.uri}#{sample.key}: its id {image_id!r} is another's too"
                    )
                seen.add(image_id)
                split = named or (hashed_split(image_id) if other == "auto" else other)
                counts[split] += 1
                if self.options.limit is None or counts[split] <= self.options.limit:
                    rows.append(_Row(image_id, sample, split))
            chosen.append(rows)
        return chosen


def _read(
    file: storage.FileInfo,
    filesystem: FileSystem,
    path: str,
    ids: dict[str, str],
    max_bytes: int,
    retry_seconds: float,
) -> Iterator[pa.Table]:
    """The pictures of a shard, from its beginning to its end.

    Args:
        ids: by key, of those that are wanted.
    """
    left = dict(ids)
    rows: list[tuple[str, int | None, bytes | None, str | None]] = []

    def table(kind: str = FINAL) -> pa.Table:
        keys, sizes, data, errors = zip(*rows, strict=True)
        return source_rows(
            [ids[key] for key in keys],
            [f"{file.uri}#{key}" for key in keys],
            data,
            errors,
            [error and kind for error in errors],
            sizes=sizes,
            mtime=file.mtime,
        )

    outage = Outage(retry_seconds)
    why, kind = "not in the shard", FINAL
    while left:
        try:
            with open_tar(filesystem, path) as tar:
                for member in tar:
                    key, suffix = split_name(member.name)
                    if key not in left or not member.isfile() or not is_picture(suffix):
                        continue
                    if member.size > max_bytes:
                        error = f"{member.size} bytes, over the limit of {max_bytes}"
                        rows.append((key, member.size, None, error))
                    else:
                        data = cast(io.BufferedReader, tar.extractfile(member)).read()
                        rows.append((key, member.size, data, None))
                    del left[key]
                    outage.over()
                    if sum(len(row[2] or b"") for row in rows) >= _BYTES_PER_TABLE:
                        yield table()
                        rows = []
            break
        except (tarfile.TarError, zlib.error, EOFError) as problem:
            why = f"the shard is damaged: {one_line(problem)}"
            break
        except (OSError, pa.ArrowException) as error:
            fault = of_place(error, filesystem, posixpath.dirname(path))
            if not outage.wait(fault, file.uri):
                why, kind = f"cannot be read: {reason_of(fault)}", kind_of(fault)
                break
    if rows:
        yield table()
    if left:
        rows = [(key, None, None, why) for key in left]
        yield table(kind)
