"""A collection's captions in the forms that other programs read: JSON lines, CSV, and files beside each picture."""

import csv
import hashlib
import io
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import pyarrow as pa

from captioner import storage
from captioner.artifacts.collection import Tables
from captioner.artifacts.manifests import FileEntry, SourceIdentity
from captioner.artifacts.output import Output
from captioner.artifacts.tables import CAPTIONED_ROWS
from captioner.captioning.names import Names
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

# What no XML may hold, not even escaped.
_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

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
        lines = _json_lines(row for _, row in _rows(tables))
        return [_write_rows(output, JSON_LINES, lines)]
    if config.format == "csv":
        lines = _csv_lines(row for _, row in _rows(tables))
        return [_write_rows(output, CSV, lines, _csv_line(_COLUMNS))]
    if config.format == "imagefolder":
        return _write_imagefolder(output, tables, config)
    if config.format in ("txt", "xmp"):
        _write_sidecars(output, tables, config)
    return []


def check_exports(config: CaptionConfig, sources: Sequence[SourceIdentity]) -> None:
    """
    Args:
        sources: of all pictures, the newest first.

    Raises:
        ConfigError: some pictures are no files to write beside, or to copy.
    """
    flag = "beside" if config.beside else "copy_pictures" if config.copy_pictures else None
    for source in sources if flag else ():
        if source.kind != "folder":
            raise ConfigError(f"{flag}: the pictures of {source.uri} are no files of their own")
        if config.beside and not storage.is_local(source.uri):
            raise ConfigError(f"beside: {source.uri} is not on this machine")
    if config.beside and config.format == "imagefolder":
        if not storage.is_directory(config.images):
            raise ConfigError(f"beside: {config.images} is no folder, which an imagefolder is")
        if others := {source.uri for source in sources} - {sources[0].uri}:
            raise ConfigError(
                f"beside: an imagefolder is one folder, and there are pictures of {min(others)}, too"
            )


def _rows(tables: Tables) -> Iterator[tuple[SourceIdentity, Row]]:
    """Each with its source, in the order of the files; thumbnails, and what a collection that grows compares, are left
    out."""
    for entry in tables.entries():
        for table in tables.rows([entry], _EXPORTED):
            for row in table.to_pylist():
                yield tables.source(entry), row


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
    names = Names(tables, beside=config.beside)

    def lines() -> Iterator[bytes]:
        return _json_lines(
            {
                "file_name": names.of_picture(source, row).removeprefix(f"{source.uri}/"),
                "text": row["caption"],
            }
            for source, row in _captioned(tables)
        )

    if config.beside:
        place = storage.join(storage.absolute(config.images), METADATA)
        data = b"".join(lines())
        if not _create(place, data):
            logger.warning("%s is there already, and was left as it is", place)
        return []
    if config.copy_pictures:

        def copy(source: SourceIdentity, row: Row) -> None:
            storage.copy_file(row["uri"], output.uri(FOLDER, names.of_picture(source, row)))

        _each(copy, _captioned(tables))
    return [_write_rows(output, f"{FOLDER}/{METADATA}", lines())]


def _write_sidecars(output: Output, tables: Tables, config: CaptionConfig) -> None:
    """A file a picture, named after it: ``a.txt`` of ``a.jpg``, and ``a.jpg.txt`` where there is an ``a.png``, too."""
    names = Names(tables, beside=config.beside)
    kept = []

    def write(source: SourceIdentity, row: Row) -> None:
        path = names.of_sidecar(source, row, f".{config.format}")
        data = _sidecar(row["caption"], config.format)
        if not config.beside:
            storage.write_bytes(output.uri(config.format, path), data)
        elif not _create(path, data):
            kept.append(path)

    _each(write, _captioned(tables))
    if kept:
        logger.warning(
            "%s files were there already, and were left as they are: %s",
            f"{len(kept):,}",
            min(kept),
        )


def _sidecar(caption: str, form: str) -> bytes:
    if form == "txt":  # a line is a caption
        return " ".join(caption.splitlines()).encode() + b"\n"
    return _XMP.format(caption=escape(_NO_XML.sub("", caption))).encode()


def _captioned(tables: Tables) -> Iterator[tuple[SourceIdentity, Row]]:
    return (found for found in _rows(tables) if found[1]["error"] is None)


def _create(uri: str, data: bytes) -> bool:
    """Write a local file unless anything else is there; the same is as good. Whether it is there now."""
    try:
        storage.create_exclusively(uri, data)
    except StoreError:
        path = Path(uri)
        if not os.path.lexists(path):
            raise
        try:
            return path.read_bytes() == data
        except OSError:  # a folder, a broken link, a file of somebody else
            return False
    return True


def _each(
    act: Callable[[SourceIdentity, Row], None], rows: Iterator[tuple[SourceIdentity, Row]]
) -> None:
    with ThreadPoolExecutor(_WRITERS) as writers:
        while some := list(islice(rows, _ROWS)):
            for _ in writers.map(lambda one: act(*one), some):
                pass
