"""What is known of Parquet files before their images are read: sizes, row groups, columns and splits."""

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq

from captioner import storage
from captioner.config import Split
from captioner.errors import SourceError, StoreError
from captioner.sources.splits import split_called
from captioner.storage.faults import one_line

_CAPTION_LISTS = ("captions", "caption", "sentences")
_SHARD = re.compile(r"(?P<name>.*)-(?P<number>\d{5})-of-(?P<total>\d{5})(-\w+)?\.parquet", re.I)


@dataclass(frozen=True)
class Columns:
    """Columns to read; of captions one with lists or several with a text each, or none."""

    image: str
    captions: tuple[str, ...]
    split: str | None
    """Column with the name of each row's split."""


@dataclass(frozen=True)
class InspectedFile:
    """A Parquet file's metadata."""

    uri: str
    path: str
    size: int
    mtime: int | None
    """Nanoseconds since 1970."""
    groups: tuple[int, ...]
    """Rows of each row group."""
    columns: Columns

    @property
    def rows(self) -> int:
        return sum(self.groups)


def is_parquet(path: str) -> bool:
    return path.lower().endswith(".parquet")


def open_files(
    uri: str, found: list[storage.FileInfo] | None, *, captions: bool = True
) -> list[InspectedFile]:
    """Inspect files, in their order, leaving out empty ones.

    Args:
        uri: the directory they were found in, or the one file if ``found`` is None.

    Raises:
        SourceError: a file is unreadable, missing from its set, or has no column of images; or all are empty.
    """
    if found is None:
        found = [storage.FileInfo(uri, uri.rpartition("/")[2], 0)]
    else:
        _check_shards(uri, [file.path for file in found])
    with ThreadPoolExecutor(16) as pool:
        opened = pool.map(partial(open_file, captions=captions), found)
        files = [file for file in opened if file.rows]
    if not files:
        raise SourceError(f"{uri}: the Parquet files hold no rows")
    return files


def _check_shards(uri: str, paths: list[str]) -> None:
    """Notice a copy or download that stopped half-way: ``-of-00003`` says how many files there must be."""
    shards: dict[str, dict[int, set[int]]] = {}
    for path in paths:
        if match := _SHARD.fullmatch(path):
            numbers = shards.setdefault(match["name"], {}).setdefault(int(match["total"]), set())
            numbers.add(int(match["number"]))
    for name, totals in shards.items():
        if len(totals) > 1:
            counts = " and ".join(str(total) for total in sorted(totals))
            raise SourceError(
                f"{uri}: {name} is there as a set of {counts} files: keep one of them"
            )
        for total, numbers in totals.items():
            for number in range(total):
                if number not in numbers:
                    raise SourceError(
                        f"{uri}: {name}-{number:05d}-of-{total:05d}.parquet is missing"
                    )


def open_file(info: storage.FileInfo, *, captions: bool = True) -> InspectedFile:
    """Inspect one file, its columns of captions only if asked to.

    Raises:
        SourceError: it is unreadable or has no column of images.
    """
    try:
        with storage.open_input(info.uri) as handle:
            size = handle.size()
            file = pq.ParquetFile(handle)
            metadata, schema = file.metadata, file.schema_arrow
    except (pa.ArrowException, StoreError, OSError) as error:
        raise SourceError(f"{info.uri}: not readable as Parquet: {one_line(error)}") from error
    groups = tuple(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
    return InspectedFile(
        info.uri, info.path, size, info.mtime, groups, _find_columns(info.uri, schema, captions)
    )


def holds_images(info: storage.FileInfo) -> bool:
    """Whether a Parquet file has a column of images, rather than captions of such that lie elsewhere; True of one that
    cannot be read."""
    try:
        with storage.open_input(info.uri) as handle:
            return any(_holds_images(field.type) for field in pq.ParquetFile(handle).schema_arrow)
    except (pa.ArrowException, StoreError, OSError):
        return True


def read_splits(file: InspectedFile) -> list[Split | None]:
    """The split that each row of a file with a ``split`` column names, None where it is null.

    Raises:
        SourceError: the column cannot be read, or a split is unknown.
    """
    try:
        with storage.open_input(file.uri) as handle:
            column = pq.ParquetFile(handle).read(columns=[file.columns.split])[0]
    except (pa.ArrowException, StoreError, OSError) as error:
        raise SourceError(f"{file.uri}: splits cannot be read: {one_line(error)}") from error
    splits: dict[str | None, Split | None] = {None: None}
    for name in column.unique().to_pylist():
        if name is not None:
            splits[name] = split_called(name)
            if splits[name] is None:
                raise SourceError(
                    f"{file.uri}: column {file.columns.split}: unknown split {name!r}"
                )
    return [splits[name] for name in column.to_pylist()]


def _find_columns(uri: str, schema: pa.Schema, with_captions: bool) -> Columns:
    images = [field.name for field in schema if _holds_images(field.type)]
    if "image" in images:
        images = ["image"]
    if len(images) != 1:
        columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise SourceError(
            f"{uri}: expected a column 'image' of binary or struct<bytes, path>, or one such column of another "
            f"name; it has: {columns}"
        )
    numbered = sorted(
        (name for name in schema.names if re.fullmatch(r"caption_\d+", name)),
        key=lambda name: int(name.rpartition("_")[2]),
    )
    captions = numbered or [name for name in _CAPTION_LISTS if name in schema.names][:1]
    captions = captions if with_captions else []
    for name in captions:
        kind = schema.field(name).type
        if not _is_text(kind) and not (_is_list(kind) and _is_text(kind.value_type)):
            raise SourceError(
                f"{uri}: column {name} is {kind}, expected string or a list of strings"
            )
    by_row = "split" in schema.names and _is_text(schema.field("split").type)
    return Columns(images[0], tuple(captions), "split" if by_row else None)


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _holds_images(kind.field("bytes").type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_list(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )
