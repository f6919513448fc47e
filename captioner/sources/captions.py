"""Captions files that people have: Flickr token files, Karpathy and COCO JSON, JSON lines and lists, CSV and TSV."""

import ast
import json
import posixpath
import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from captioner.config import SourceConfig
from captioner.errors import SourceError
from captioner.sources.columns import (
    IMAGE_SUFFIX,
    column_flags,
    find_caption_columns,
    find_image_column,
    find_split_column,
    is_image_column,
    named,
    normal,
    texts_of,
)
from captioner.sources.encodings import decode_text
from captioner.sources.tables import read_table

_TOKEN_LINE = re.compile(r"^(?P<name>.+)#(?P<index>\d+)\t(?P<caption>.*)$")
_Row = tuple[str, dict[str, Any]]
"""Where it stands, for a message, and its values by column."""


@dataclass(frozen=True)
class CaptionFile:
    """What a captions file says, by image name as written there, in NFC."""

    captions: dict[str, list[str]] = field(default_factory=dict)
    splits: dict[str, str] = field(default_factory=dict)
    """What the file calls the split of an image, where it says."""
    ids: dict[str, str] = field(default_factory=dict)
    """The user's own id of each image, where a column of them was asked for."""


def parse_captions(name: str, data: bytes, options: SourceConfig | None = None) -> CaptionFile:
    """Read a captions file; the format is told from its content.

    Raises:
        SourceError: it is none of the formats, or contradicts itself; the message names the line or image.
    """
    options = options or SourceConfig()
    if data.startswith(b"PAR1"):
        return _records(name, _parquet(name, data), options)
    text = decode_text(name, data, options)
    start = text.lstrip()[:1]
    try:
        if start in ("{", "["):
            found = _json(name, text, options)
        elif _TOKEN_LINE.match(text.lstrip().partition("\n")[0]):
            _refuse_columns(name, "Flickr's token lines", options)
            found = _tokens(name, text)
        else:
            found = _table(name, text, options)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{name}: not JSON: {error}") from error
    return found


def _refuse_columns(name: str, what: str, options: SourceConfig, but: Collection[str] = ()) -> None:
    if flags := column_flags(options, but=but):
        raise SourceError(f"{name}: {what} have no columns, which {flags[0]} names")


def _tokens(name: str, text: str) -> CaptionFile:
    """``name.jpg#0<TAB>text``, as Flickr8k.token.txt and results_20130124.token have it."""
    found: dict[str, dict[int, str]] = {}
    # Not splitlines(), which also breaks at separators that occur inside captions.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        match = _TOKEN_LINE.match(line)
        if match is None:
            raise SourceError(f"{name}, line {number}: expected 'name.jpg#0<TAB>caption'")
        captions = found.setdefault(_nfc(match["name"]), {})
        index = int(match["index"])
        if index in captions:
            raise SourceError(f"{name}, line {number}: {match['name']}#{index} is given twice")
        captions[index] = match["caption"].strip()
    return CaptionFile(
        {image: [text for _, text in sorted(captions.items())] for image, captions in found.items()}
    )


def _json(name: str, text: str, options: SourceConfig) -> CaptionFile:
    try:
        raw = json.loads(text)
    except json.JSONDecodeError:
        lines = [line for line in text.split("\n") if line.strip()]
        if len(lines) < 2:
            raise
        raw = [json.loads(line) for line in lines]
    if isinstance(raw, dict):
        if "images" in raw and "annotations" in raw:
            _refuse_columns(name, "COCO's captions", options, but=["id_column"])
            return _coco(name, raw["images"], raw["annotations"], options)
        lists = [value for value in raw.values() if isinstance(value, list) and value]
        tables = [rows for rows in lists if all(isinstance(row, dict) for row in rows)]
        if _is_record(name, raw, options, sure=bool(tables)):
            raw = [raw]  # JSON lines of one line
        elif len(tables) == 1:
            raw = tables[0]
        elif raw and all(isinstance(value, str | list) for value in raw.values()):
            # {"1.jpg": ["a dog", ...]}
            raw = [{"image": image, "captions": texts} for image, texts in raw.items()]
        elif raw and all(isinstance(value, dict) for value in raw.values()):
            raw = _unpivoted(raw)
    if not isinstance(raw, list) or not all(isinstance(row, dict) for row in raw):
        raise SourceError(
            f"{name}: not captions: neither Karpathy's nor COCO's JSON, nor a list of records"
        )
    return _records(name, ((f"{name}, record {n}", row) for n, row in enumerate(raw, 1)), options)


def _is_record(name: str, raw: dict[str, Any], options: SourceConfig, *, sure: bool) -> bool:
    """Whether an object is about one image, rather than one of captions by image or of columns.

    Args:
        sure: only where what names the image looks like a file's name.
    """
    keys = [key for key in raw if key == options.image_column or is_image_column([key])]
    names = [str(raw[key]) for key in keys if isinstance(raw[key], str | int)]
    if sure:
        names = [one for one in names if IMAGE_SUFFIX.fullmatch(one)]
    return bool(names and find_caption_columns(list(raw), options, name, lambda column: True))


def _unpivoted(raw: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Records by column, as pandas writes them, or by image."""
    if is_image_column(raw):
        rows = dict.fromkeys(row for column in raw.values() for row in column)
        return [{name: column.get(row) for name, column in raw.items()} for row in rows]
    return [{"image": image, **record} for image, record in raw.items()]


def record_texts(name: str, data: bytes, options: SourceConfig) -> list[str]:
    """The captions in a JSON file about one picture; none where it is something else."""
    try:
        record = json.loads(decode_text(name, data, options))
        columns = find_caption_columns(list(record), options, name, lambda column: True)
        return [_text(text) for column in columns for text in texts_of(record[column])]
    except (ValueError, TypeError, KeyError, RecursionError):
        return []


def _coco(name: str, images: Any, annotations: Any, options: SourceConfig) -> CaptionFile:
    """COCO captions: ``images`` with id and file_name, ``annotations`` with image_id and caption."""
    found = CaptionFile()
    names: dict[Any, str] = {}
    try:
        for image in images:
            if image["id"] in names:
                raise SourceError(f"{name}: image id {image['id']} is given twice")
            path = _nfc(image["file_name"])
            if path in found.captions:
                raise SourceError(f"{name}: image {path} is given twice")
            names[image["id"]] = path
            found.captions[path] = []
            if options.id_column is not None:
                found.ids[path] = str(image[named(image, options.id_column, "id-column", name)])
        for annotation in annotations:
            if annotation["image_id"] not in names:
                raise SourceError(
                    f"{name}: a caption for image id {annotation['image_id']}, which is not there"
                )
            found.captions[names[annotation["image_id"]]].append(_text(annotation["caption"]))
    except (KeyError, TypeError, AttributeError, UnicodeEncodeError) as error:
        raise SourceError(f"{name}: not COCO's captions: {error!r}") from error
    return found


def _table(name: str, text: str, options: SourceConfig) -> CaptionFile:
    """CSV or TSV with a header line, or without one where the columns asked for are numbers."""
    asked = [
        column
        for column in (
            options.image_column,
            *options.caption_columns,
            options.split_column,
            options.id_column,
        )
        if column is not None
    ]
    numbered = options.image_column is not None and all(map(str.isdecimal, asked))
    table = read_table(name, text, columns=max(map(int, asked)) if numbered else None)
    image = find_image_column(table.columns, options, name, table.some)
    # The first line may be a row: a.jpg is no column's name.
    captions = find_caption_columns(table.columns, options, name, lambda column: column != image)
    if image is None or not (captions or options.id_column):
        first = text.strip("\n").partition("\n")[0][:60]
        raise SourceError(
            f"{name}: not a captions file: expected token lines, JSON, or a table whose first line names columns of "
            f"images (image, file_name ...) and captions (caption, text ...), or source-options.image-column and "
            f"source-options.caption-columns (1, 2 ... where no line names them); the first line is {first!r}"
        )
    rows = (
        (f"{name}, line {line}", row) for line, row in table.rows([*table.columns, *captions][-1])
    )
    return _collect(rows, name, options, image, captions, table.columns)


def _parquet(name: str, data: bytes) -> Iterator[_Row]:
    """The rows of a table that lies beside the images, such as img2dataset's or an image folder's metadata."""
    try:
        rows = pq.read_table(pa.BufferReader(data)).to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise SourceError(
            f"{name}: not readable as Parquet: {' '.join(str(error).split())}"
        ) from error
    for number, row in enumerate(rows):
        # img2dataset also lists what it could not download.
        if row.get("status", "success") == "success":
            yield f"{name}, row {number}", row


def _records(name: str, rows: Iterable[_Row], options: SourceConfig) -> CaptionFile:
    """Records of any kind that name an image each; columns as in a table, values perhaps nested."""
    found = list(rows)
    columns = list(dict.fromkeys(str(column) for _, row in found[:100] for column in row))

    def some(column: str) -> list[Any]:
        return [row.get(column) for _, row in found[:100]]

    def fit(column: str) -> bool:
        try:
            return any(texts_of(value) for value in some(column))
        except TypeError:
            return False

    image = find_image_column(columns, options, name, some)
    captions = find_caption_columns(columns, options, name, fit)
    listed = ", ".join(columns)
    if image is None or (not captions and not options.id_column):
        raise SourceError(
            f"{name}: not captions: no field of an image's name or none of captions among {listed or 'none'}: name "
            "them with source-options.image-column and source-options.caption-columns"
        )
    return _collect(found, name, options, image, captions, columns)


def _collect(
    rows: Iterable[_Row],
    name: str,
    options: SourceConfig,
    image: str,
    captions: tuple[str, ...],
    columns: list[str],
) -> CaptionFile:
    """What the rows say of each image; rows of the same image follow each other or not."""
    found = CaptionFile()
    split = find_split_column(columns, options, name, lambda column: True)
    own = options.id_column and named(columns, options.id_column, "id-column", name)
    folder = next((column for column in columns if normal(column) == "filepath"), image)
    for place, row in rows:
        try:
            path = _nfc(row[image])
            # Karpathy's COCO: the file's name, and the folder it is in.
            if folder != image and row.get(folder) and not str(row[folder]).endswith(path):
                path = posixpath.join(_nfc(row[folder]), path)
            texts = [_text(text) for column in captions for text in _unfolded(row.get(column))]
            labels = (
                (found.splits, row.get(split) if split else None, "splits"),
                (found.ids, row.get(own) if own else None, "ids"),
            )
            for values, value, what in labels:
                text = "" if value is None else _nfc(value)
                if text and values.setdefault(path, text) != text:
                    raise SourceError(
                        f"{place}: image {path} has two {what}, {values[path]!r} and {text!r}"
                    )
        except (KeyError, TypeError, AttributeError, UnicodeEncodeError) as error:
            raise SourceError(f"{place}: {error!r}") from error
        if not path:
            raise SourceError(f"{place}: no image is named")
        found.captions.setdefault(path, []).extend(text for text in texts if text)
    return found


def _unfolded(value: Any) -> list[str]:
    """The captions of a cell; a list of them may be written as JSON, or as Python writes it."""
    if isinstance(value, str) and re.match(r"\[\s*['\"]", value):
        # numpy's lists have no commas.
        python = re.sub(r"(['\"])\s+(?=['\"])", r"\1, ", value)
        for read, written in ((json.loads, value), (ast.literal_eval, python)):
            try:
                return texts_of(read(written))
            except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
                continue
    return texts_of(value)


def _nfc(value: Any) -> str:
    """A name: as macOS decomposes accents, names on disk and in tables are compared composed."""
    if not isinstance(value, str | int):
        raise TypeError(f"{value!r} is not a name")
    return unicodedata.normalize("NFC", _text(str(value)))


def _text(value: str) -> str:
    value.encode()  # JSON allows halves of characters
    return value.strip()
