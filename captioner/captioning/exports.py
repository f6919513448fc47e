"""A collection's captions in the forms that other programs read: JSON lines, CSV, and files beside each picture."""

import csv
import hashlib
import io
import json
import logging
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any
from xml.sax.saxutils import escape

import pyarrow as pa
import pyarrow.compute as pc

from captioner import storage
from captioner.artifacts.collection import Tables
from captioner.artifacts.manifests import FileEntry
from captioner.artifacts.output import Output
from captioner.artifacts.tables import CAPTIONED_ROWS
from captioner.config import CaptionConfig
from captioner.errors import ConfigError, StoreError

logger = logging.getLogger(__name__)

JSON_LINES, CSV, METADATA = "captions.jsonl", "captions.csv", "metadata.jsonl"
FOLDER = "imagefolder"
_EXPORTED = pa.schema(
    [field for field in CAPTIONED_ROWS if field.name not in ("size", "mtime", "sha256")]
)
_COLUMNS = ("image_id", "uri", "caption", "log_prob", "alternatives", "error")  # of CSV
# Small files are written so many at a time: an object store answers late.
_WRITERS = 16
_ROWS = 1024

Row = dict[str, Any]

_XMP = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about="" xmlns:dc="http://purl.org/dc/elements/1.1/">
   <dc:description><rdf:Alt><rdf:li xml:lang="x-default">{caption}</rdf:li></rdf:Alt></dc:description>
  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="w"?>
"""


def write_exports(output: Output, tables: Tables, config: CaptionConfig) -> list[FileEntry]:
    """Write ``config.format``, made of the tables.

    Pictures without a caption are rows of JSON lines and CSV, and have no file of their own.

    Args:
        tables: the captions.

    Returns:
        what the manifest is to list: files of many rows, but not the one that each picture has.

    Raises:
        StoreError: something cannot be written.
    """
    if config.format == "jsonl":
        return [_write_rows(output, JSON_LINES, _json_lines(_rows(tables)))]
    if config.format == "csv":
        lines = _csv_lines(_rows(tables))
        return [_write_rows(output, CSV, lines, _csv_line(_COLUMNS))]
    if config.format == "imagefolder":
        return _write_imagefolder(output, tables, config)
    if config.format in ("txt", "xmp"):
        _write_sidecars(output, tables, config)
    return []


def check_exports(config: CaptionConfig, kind: str) -> None:
    """
    Args:
        kind: of the source.

    Raises:
        ConfigError: the source has no files to write beside, or to copy.
    """
    flag = "beside" if config.beside else "copy_pictures" if config.copy_pictures else None
    if flag and kind != "folder":
        raise ConfigError(f"{flag}: the pictures of {config.images} are no files of their own")
    if config.beside and not storage.is_local(config.images):
        raise ConfigError(f"beside: {config.images} is not on this machine")
    if config.beside and config.format == "imagefolder" and not storage.is_directory(config.images):
        raise ConfigError(f"beside: {config.images} is no folder, which an imagefolder is")


def _rows(tables: Tables) -> Iterator[Row]:
    """In the order of the files; thumbnails, and what a collection that grows compares, are left out."""
    for table in tables.rows(tables.entries(), _EXPORTED):
        yield from table.to_pylist()


def _write_rows(
    output: Output, path: str, lines: Iterable[bytes], header: bytes = b""
) -> FileEntry:
    count, digest = 0, hashlib.sha256(header)
    with storage.atomic_writer(output.uri(path)) as target:
        size = target.write(header)
        for line in lines:
            digest.update(line)
            size += target.write(line)
            count += 1
    return FileEntry(path=path, bytes=size, rows=count, sha256=digest.hexdigest())


def _json_lines(rows: Iterable[Row]) -> Iterator[bytes]:
    return (json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def _csv_lines(rows: Iterable[Row]) -> Iterator[bytes]:
    """The alternatives' texts are one JSON list."""
    for row in rows:
        texts = [other["caption"] for other in row["alternatives"] or ()]
        listed = json.dumps(texts, ensure_ascii=False)
        yield _csv_line(listed if name == "alternatives" else row[name] for name in _COLUMNS)


def _csv_line(values: Iterable[object]) -> bytes:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(values)
    return buffer.getvalue().encode()


def _write_imagefolder(output: Output, tables: Tables, config: CaptionConfig) -> list[FileEntry]:
    """``metadata.jsonl`` as the ``imagefolder`` of ``datasets`` reads it, with the pictures if asked for."""

    def lines() -> Iterator[bytes]:
        return _json_lines(
            {"file_name": _inside(row["image_id"]), "text": row["caption"]}
            for row in _rows(tables)
            if row["error"] is None
        )

    if config.beside:
        place = storage.join(config.images, METADATA)
        data = b"".join(lines())
        if not _create(place, data):
            logger.warning("%s is there already, and was left as it is", place)
        return []
    if config.copy_pictures:

        def copy(row: Row) -> None:
            storage.copy_file(row["uri"], output.uri(FOLDER, _inside(row["image_id"])))

        _each(copy, (row for row in _rows(tables) if row["error"] is None))
    return [_write_rows(output, f"{FOLDER}/{METADATA}", lines())]


def _write_sidecars(output: Output, tables: Tables, config: CaptionConfig) -> None:
    """A file a picture, named after it: ``a.txt`` of ``a.jpg``, and ``a.jpg.txt`` where there is an ``a.png``, too."""
    shared = _shared_stems(tables)
    kept = []

    def write(row: Row) -> None:
        name = _inside(row["image_id"])
        stem = posixpath.splitext(name)[0]
        path = f"{name if stem in shared else stem}.{config.format}"
        data = _sidecar(row["caption"], config.format)
        if not config.beside:
            storage.write_bytes(output.uri(config.format, path), data)
        elif not _create(
            storage.join(posixpath.dirname(row["uri"]), posixpath.basename(path)), data
        ):
            kept.append(path)

    _each(write, (row for row in _rows(tables) if row["error"] is None))
    if kept:
        logger.warning(
            "%s files were there already, and were left as they are: %s",
            f"{len(kept):,}",
            min(kept),
        )


def _sidecar(caption: str, form: str) -> bytes:
    if form == "txt":
        return caption.encode() + b"\n"
    return _XMP.format(caption=escape(caption)).encode()


def _shared_stems(tables: Tables) -> set[str]:
    """Names without suffix that several pictures have."""
    found = []
    for table in tables.rows(tables.entries(), pa.schema([CAPTIONED_ROWS.field("image_id")])):
        stems = [posixpath.splitext(_inside(name))[0] for name in table["image_id"].to_pylist()]
        found.append(pa.array(stems, pa.string()))
    counts = pc.value_counts(pa.chunked_array(found, pa.string()))
    several = counts.filter(pc.greater(counts.field("counts"), 1))
    return set(several.field("values").to_pylist())


def _inside(image_id: str) -> str:
    """The id as a relative path that leads nowhere else."""
    parts = [re.sub(r"[\0-\x1f]", "_", part) for part in image_id.split("/")]
    return "/".join("_" if part in ("", ".", "..") else part for part in parts)


def _create(uri: str, data: bytes) -> bool:
    """Write a file unless another is there; the same is as good. Whether it is there now."""
    try:
        storage.create_exclusively(uri, data)
    except StoreError:
        if not storage.exists(uri):
            raise
        return storage.read_bytes(uri) == data
    return True


def _each(act: Callable[[Row], None], rows: Iterator[Row]) -> None:
    with ThreadPoolExecutor(_WRITERS) as writers:
        while some := list(islice(rows, _ROWS)):
            for _ in writers.map(act, some):
                pass
