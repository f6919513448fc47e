"""What is in tar shards, as webdataset and img2dataset write them: a sample's files share a name up to a dot."""

import io
import json
import posixpath
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, Any, cast

import pyarrow.parquet as pq
from pyarrow.fs import FileSystem, LocalFileSystem

from captioner import storage
from captioner.config import SourceConfig
from captioner.errors import SourceError
from captioner.sources.columns import (
    IMAGE_SUFFIX,
    NO_CAPTIONS,
    find_caption_columns,
    named,
    texts_of,
)
from captioner.sources.encodings import decode_text
from captioner.sources.listing import NOT_TEXT, is_text
from captioner.sources.outage import TABLE_ERRORS, told_of
from captioner.storage.faults import one_line

SUFFIXES = (".tar", ".tar.gz", ".tgz")
_BUFFER = 2**20
_SUCCESS = "success"


@dataclass(frozen=True)
class Sample:
    """A picture in a shard."""

    key: str
    captions: tuple[str, ...]
    own_id: str | None


@dataclass(frozen=True)
class Shard:
    """A tar file's metadata."""

    file: storage.FileInfo
    samples: tuple[Sample, ...]
    left_out: dict[str, int] = field(default_factory=dict)
    """Samples that are no pictures, by kind."""

    @property
    def stem(self) -> str:
        """The path without its suffix, with which the ids of the shard's samples begin."""
        return stem_of(self.file.path)


@dataclass
class _Found:
    """What a shard holds under a key."""

    image: bool = False
    more: int = 0
    """Pictures besides the first."""
    texts: list[str] | None = None
    record: dict[str, Any] = field(default_factory=dict)


def is_shard(path: str) -> bool:
    return path.lower().endswith(SUFFIXES)


def is_archive(path: str) -> bool:
    """Whether a shard is compressed, as what people download is and shards seldom are."""
    return is_shard(path) and not path.lower().endswith(".tar")


def stem_of(path: str) -> str:
    suffix = max((one for one in SUFFIXES if path.lower().endswith(one)), key=len)
    return path[: -len(suffix)]


def split_name(member: str) -> tuple[str, str]:
    """A member's key and the rest of its name after the first dot, in lower case."""
    folder, base = posixpath.split(member.removeprefix("./"))
    key, _, rest = base.partition(".")
    return posixpath.join(folder, key), rest.lower()


def is_picture(suffix: str) -> bool:
    """Whether a member with this after its key is the sample's picture (``jpg``, not ``seg.png``)."""
    return "." not in suffix and IMAGE_SUFFIX.fullmatch(f"x.{suffix}") is not None


@contextmanager
def open_tar(filesystem: FileSystem, path: str) -> Iterator[tarfile.TarFile]:
    """A shard, read from its beginning to its end; local ones skip what is not asked for."""
    if isinstance(filesystem, LocalFileSystem):
        with open(path, "rb", buffering=2**16) as local, tarfile.open(fileobj=local) as tar:
            yield tar
        return
    with filesystem.open_input_stream(path, buffer_size=_BUFFER) as stream:
        handle = cast(IO[bytes], stream)
        with tarfile.open(fileobj=handle, mode="r|*") as tar:
            yield tar


def index_shard(
    file: storage.FileInfo, table: storage.FileInfo | None, options: SourceConfig, captions: bool
) -> Shard:
    """The samples of a shard: by the table that img2dataset writes beside it, where there is one, else by reading all
    of its names and texts.

    Raises:
        SourceError: it cannot be read, or ends early and ``options`` does not say that it may.
        OutOfReachError: the store is away.
    """
    if table is not None:
        rows = _read_table(table, options)
        if rows is not None:
            return _shard(file, rows, options, captions, Counter())
    filesystem, path = storage.resolve(file.uri)
    found: dict[str, _Found] = {}
    left_out: Counter[str] = Counter()
    try:
        with storage.reading(file.uri), open_tar(filesystem, path) as tar:
            for member in tar:
                if not is_text(member.name):
                    left_out[NOT_TEXT] += is_picture(split_name(member.name)[1])
                elif member.isfile():
                    _add(found, tar, member, f"{file.uri}#{member.name}", options)
    except (tarfile.TarError, zlib.error, EOFError) as error:
        if not options.partial:
            raise SourceError(
                f"{file.uri}: not readable to its end: {one_line(error)}; source-options.partial goes on with what "
                "is there"
            ) from error
        left_out["end of a damaged shard"] += 1
    return _shard(file, found, options, captions, left_out)


def _add(
    found: dict[str, _Found],
    tar: tarfile.TarFile,
    member: tarfile.TarInfo,
    place: str,
    options: SourceConfig,
) -> None:
    key, suffix = split_name(member.name)
    if not key or posixpath.basename(key).startswith("._"):
        return
    sample = found.setdefault(key, _Found())
    if is_picture(suffix):
        sample.more += sample.image
        sample.image = True
    elif suffix in ("txt", "caption", "json"):
        data = cast(io.BufferedReader, tar.extractfile(member)).read()
        if suffix == "json":
            try:
                record = json.loads(data)
            except (ValueError, RecursionError) as error:
                raise SourceError(f"{place}: not JSON: {error}") from error
            sample.record = record if isinstance(record, dict) else {"captions": record}
        else:
            text = decode_text(place, data, options)
            sample.texts = [line.strip() for line in text.split("\n") if line.strip()]


def _read_table(table: storage.FileInfo, options: SourceConfig) -> dict[str, _Found] | None:
    """What img2dataset notes of a shard; None where the table is another's."""
    try:
        with storage.open_input(table.uri) as handle:
            file = pq.ParquetFile(handle)
            names = file.schema_arrow.names
            if not {"key", "status"} <= set(names):
                return None
            captions = find_caption_columns(names, options, table.uri, lambda name: True)
            own = (
                [named(names, options.id_column, "id-column", table.uri)]
                if options.id_column
                else []
            )
            rows = file.read(columns=[*{"key", "status", *captions, *own}]).to_pylist()
    except TABLE_ERRORS as error:
        raise told_of(f"{table.uri}: not readable as Parquet", error) from error
    return {str(row["key"]): _Found(row["status"] == _SUCCESS, record=row) for row in rows}


def _shard(
    file: storage.FileInfo,
    found: dict[str, _Found],
    options: SourceConfig,
    captions: bool,
    left_out: Counter[str],
) -> Shard:
    with_captions = captions and options.captions != NO_CAPTIONS
    columns: dict[tuple[str, ...], tuple[str, ...]] = {}
    samples = []
    for key, sample in found.items():
        if sample.record.get("status", _SUCCESS) != _SUCCESS:
            left_out["failed download"] += 1
            continue
        if not sample.image:
            left_out["sample without a picture"] += 1
            continue
        left_out["further picture"] += sample.more
        place = f"{file.uri}#{key}"
        texts = sample.texts or []
        names = tuple(sample.record)
        if with_captions and names and (options.caption_columns or sample.texts is None):
            if names not in columns:
                columns[names] = find_caption_columns(names, options, place, lambda name: True)
            try:
                texts = [
                    text for name in columns[names] for text in texts_of(sample.record.get(name))
                ]
            except TypeError as error:
                raise SourceError(f"{place}: {error}") from error
        own = None
        if options.id_column is not None:
            own = str(sample.record[named(names, options.id_column, "id-column", place)])
        texts = [text for text in texts if text.strip()] if with_captions else []
        samples.append(Sample(key, tuple(texts), own))
    return Shard(file, tuple(samples), dict(+left_out))
