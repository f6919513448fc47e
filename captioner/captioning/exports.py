"""A collection's captions in the forms that other programs read: JSON lines, CSV, and files beside each picture."""

import csv
import io
import json
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from xml.sax.saxutils import escape

from captioner import storage
from captioner.artifacts.collection import Tables
from captioner.artifacts.manifests import FileEntry, SourceIdentity
from captioner.artifacts.output import Output
from captioner.captioning.imagefolder import write_imagefolder
from captioner.captioning.names import Names
from captioner.captioning.rows import (
    Row,
    captioned,
    create,
    each,
    json_lines,
    read_rows,
    write_rows,
)
from captioner.config import CaptionConfig
from captioner.errors import ConfigError

logger = logging.getLogger(__name__)

JSON_LINES, CSV = "captions.jsonl", "captions.csv"
_COLUMNS = ("image_id", "uri", "caption", "log_prob", "alternatives", "error")  # of CSV
# What no XML may hold, not even escaped.
_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

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
        lines = json_lines(row for _, row in read_rows(tables))
        return [write_rows(output, JSON_LINES, lines)]
    if config.format == "csv":
        lines = _csv_lines(row for _, row in read_rows(tables))
        return [write_rows(output, CSV, lines, _csv_line(_COLUMNS))]
    if config.format == "imagefolder":
        return write_imagefolder(output, tables, config)
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


def _write_sidecars(output: Output, tables: Tables, config: CaptionConfig) -> None:
    """A file a picture, named after it: ``a.txt`` of ``a.jpg``, and ``a.jpg.txt`` where there is an ``a.png``, too."""
    names = Names(tables, beside=config.beside)
    kept = []

    def write(source: SourceIdentity, row: Row) -> None:
        path = names.of_sidecar(source, row, f".{config.format}")
        data = _sidecar(row["caption"], config.format)
        if not config.beside:
            storage.write_bytes(output.uri(config.format, path), data)
        elif not create(path, data):
            kept.append(path)

    each(write, captioned(tables))
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
