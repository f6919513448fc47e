"""What is known of Parquet files before their images are read: sizes, row groups, columns and splits."""

import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq

from captioner import storage
from captioner.artifacts.tables import RETRYABLE
from captioner.config import SourceConfig
from captioner.errors import SourceError
from captioner.sources.columns import (
    NO_CAPTIONS,
    TEXT_FIELDS,
    find_caption_columns,
    find_split_column,
    might_be_captions,
    named,
    normal,
)
from captioner.sources.outage import TABLE_ERRORS, kind_of, told_of

SUFFIX = ".parquet"
# Where several columns are binary, the first of these is the picture; webdataset's are called as files end.
_USUAL = ("image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp")
# Rows that are looked at.
_FIRST = 8
_SHARD = re.compile(r"(?P<name>.*)-(?P<number>\d{5})-of-(?P<total>\d{5})(-\w+)?\.parquet", re.I)


@dataclass(frozen=True)
class Columns:
    """Columns to read."""

    image: str
    captions: tuple[str, ...]
    """Each with texts, or with lists or records of them; or none."""
    split: str | None
    """Column with the name of each row's split."""
    id: str | None
    """Column with the user's own ids."""


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

    @property
    def stem(self) -> str:
        """The path without its suffix, with which the ids of the file's rows begin."""
        return self.path[: -len(SUFFIX)]


def is_parquet(path: str) -> bool:
    return path.lower().endswith(SUFFIX)


def open_files(
    uri: str, found: list[storage.FileInfo] | None, options: SourceConfig, *, captions: bool = True
) -> list[InspectedFile]:
    """Inspect files, in their order, leaving out empty ones.

    Args:
        uri: the directory they were found in, or the one file if ``found`` is None.

    Raises:
        SourceError: a file is unreadable, missing from its set, or has no column of images; or all are empty.
    """
    if found is None:
        found = [storage.FileInfo(uri, uri.rpartition("/")[2], 0)]
    elif not options.partial:
        _check_shards(uri, [file.path for file in found])
    with ThreadPoolExecutor(16) as pool:
        opened = pool.map(partial(open_file, options=options, captions=captions), found)
        files = [file for file in opened if file.rows]
    if not files:
        raise SourceError(f"{uri}: the Parquet files hold no rows")
    stems = Counter(file.stem for file in files)
    if len(stems) < len(files):
        raise SourceError(f"{uri}: two files are called {stems.most_common(1)[0][0]}{SUFFIX}")
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
                        f"{uri}: {name}-{number:05d}-of-{total:05d}.parquet is missing; source-options.partial "
                        "goes on with what is there"
                    )


def open_file(
    info: storage.FileInfo, options: SourceConfig, *, captions: bool = True
) -> InspectedFile:
    """Inspect one file, its columns of captions only if asked to.

    Raises:
        SourceError: it is unreadable or has no column of images.
    """
    try:
        with storage.open_input(info.uri) as handle:
            size = handle.size()
            file = pq.ParquetFile(handle)
            metadata, schema = file.metadata, file.schema_arrow
    except TABLE_ERRORS as error:
        raise told_of(f"{info.uri}: not readable as Parquet", error) from error
    groups = tuple(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
    return InspectedFile(
        info.uri,
        info.path,
        size,
        info.mtime,
        groups,
        _find_columns(info.uri, schema, options, captions),
    )


def holds_images(info: storage.FileInfo) -> bool:
    """Whether a Parquet file has a column of images, rather than captions of such that lie elsewhere; True of one that
    is damaged.

    Raises:
        OutOfReachError: it cannot be read now.
    """
    with _damaged(info), storage.open_input(info.uri) as handle:
        return any(_holds_images(field.type) for field in pq.ParquetFile(handle).schema_arrow)
    return True


def names_images(info: storage.FileInfo) -> bool:
    """Whether a Parquet file names files of images instead of holding them, as its first rows tell; False of one that
    is damaged.

    Raises:
        OutOfReachError: it cannot be read now.
    """
    with _damaged(info), storage.open_input(info.uri) as handle:
        file = pq.ParquetFile(handle)
        columns = [field.name for field in file.schema_arrow if _names_files(field.type)]
        rows = next(file.iter_batches(_FIRST, columns=columns), None) if columns else None
        cells = [cell for column in (rows or ()) for cell in column.to_pylist() if cell]
        return any(cell["path"] and cell.get("bytes") is None for cell in cells)
    return False


@contextmanager
def _damaged(info: storage.FileInfo) -> Iterator[None]:
    """Goes on after the block where a file turns out to be damaged in it, but not where it cannot be read now."""
    try:
        yield
    except TABLE_ERRORS as error:
        if kind_of(error) == RETRYABLE:
            raise told_of(info.uri, error) from error


def read_column(file: InspectedFile, name: str) -> list[str | None]:
    """The texts, or numbers as such, in a column of splits or ids; None where it is null.

    Raises:
        SourceError: the column cannot be read.
    """
    try:
        with storage.open_input(file.uri) as handle:
            values = pq.ParquetFile(handle).read(columns=[name])[0].to_pylist()
    except TABLE_ERRORS as error:
        raise told_of(f"{file.uri}: column {name} cannot be read", error) from error
    return [None if value is None else str(value).strip() for value in values]


def _find_columns(
    uri: str, schema: pa.Schema, options: SourceConfig, with_captions: bool
) -> Columns:
    names = schema.names

    def is_text(name: str) -> bool:
        return _is_text(schema.field(name).type)

    def fit(name: str) -> bool:
        return name != image and _holds_text(schema.field(name).type)

    image = _find_image(uri, schema, options)
    captions: tuple[str, ...] = ()
    if with_captions and options.captions != NO_CAPTIONS:
        captions = find_caption_columns(names, options, uri, fit)
        for name in captions or filter(might_be_captions, names):
            kind = schema.field(name).type
            if name != image and not _holds_text(kind):
                raise SourceError(
                    f"{uri}: column {name} is {kind}, expected string or a list of strings; source-options.captions "
                    "none goes on without captions"
                )
    own = options.id_column and named(names, options.id_column, "id-column", uri)
    return Columns(image, captions, find_split_column(names, options, uri, is_text), own)


def _find_image(uri: str, schema: pa.Schema, options: SourceConfig) -> str:
    images = [field.name for field in schema if _holds_images(field.type)]
    if options.image_column is not None:
        column = named(schema.names, options.image_column, "image-column", uri)
        if column not in images:
            raise SourceError(
                f"{uri}: column {column} is {schema.field(column).type}, expected images: binary or "
                "struct<bytes, path>"
            )
        return column
    usual = [name for called in _USUAL for name in images if normal(name) == called][:1]
    if len(usual or images) != 1:
        columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise SourceError(
            f"{uri}: expected a column 'image' of binary or struct<bytes, path>, one such column of another name, or "
            f"source-options.image-column; it has: {columns}"
        )
    (found,) = usual or images
    return str(found)


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        names = {field.name: field.type for field in kind}
        if _is_binary(names.get("bytes", pa.null())):
            return True
        return _names_files(kind)
    return _is_binary(kind)


def _names_files(kind: pa.DataType) -> bool:
    """As datasets has it where the files lie elsewhere."""
    names = {field.name for field in kind} if pa.types.is_struct(kind) else set()
    return "path" in names and names <= {"bytes", "path"}


def _is_binary(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(
        pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)
    )


def _holds_text(kind: pa.DataType) -> bool:
    """Text, or lists of it, or of records with some; or nothing but nulls."""
    if pa.types.is_null(kind):
        return True
    if _is_list(kind):
        return _holds_text(kind.value_type)
    if pa.types.is_struct(kind):
        return any(normal(field.name) in TEXT_FIELDS and _is_text(field.type) for field in kind)
    return _is_text(kind)


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    )


def _is_list(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_list(kind)
        or pa.types.is_large_list(kind)
        or pa.types.is_fixed_size_list(kind)
        or pa.types.is_list_view(kind)
        or pa.types.is_large_list_view(kind)
    )
