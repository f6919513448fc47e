"""A collection's captions as an ``imagefolder`` of the library ``datasets``: ``metadata.jsonl`` beside pictures.

``datasets`` takes words such as ``test`` in the names of folders, or else of files, for splits. Where it finds one it
reads those splits alone, each with the metadata that lies in its own folders.
"""

import logging
import posixpath
import re
from collections import Counter
from collections.abc import Iterator

from captioner import storage
from captioner.artifacts.collection import Tables
from captioner.artifacts.manifests import FileEntry, SourceIdentity
from captioner.artifacts.output import Output
from captioner.captioning.names import PLACES, Names
from captioner.captioning.rows import Row, captioned, create, each, json_lines, write_rows
from captioner.config import CaptionConfig

logger = logging.getLogger(__name__)

FOLDER, METADATA = "imagefolder", "metadata.jsonl"
_SPLIT = re.compile(
    r"((?<=[-._ 0-9/])|^)(train|training|validation|valid|dev|val|test|testing|eval|evaluation)(?=[-._ 0-9/]|$)"
)


def write_imagefolder(output: Output, tables: Tables, config: CaptionConfig) -> list[FileEntry]:
    """Write the captions, with the pictures if asked for. They lie in one file, or, where folders say splits, in one
    in each folder with pictures.

    Of copies whose names say a split while others' do not, those words get a tilde: all of them are read.

    Returns:
        what the manifest is to list.

    Raises:
        StoreError: something cannot be written.
    """
    names = Names(tables, beside=config.beside)
    kinds = Counter(map(_says_split, _paths(tables, names)))
    by_folder = "folder" in kinds and (config.beside or len(kinds) == 1)
    if config.beside and (len(kinds) > 1 or "file" in kinds):
        logger.warning(
            "imagefolder: datasets takes words such as test in names for splits, and finds captions of %s of %s "
            "pictures here: --copy-pictures makes a folder of all",
            f"{kinds['folder']:,}",
            f"{kinds.total():,}",
        )
    elif config.copy_pictures and not by_folder and set(kinds) != {"nothing"}:
        names = Names(tables, beside=False, edit=_unsaid)
    if config.copy_pictures:

        def copy(source: SourceIdentity, row: Row) -> None:
            storage.copy_file(row["uri"], output.uri(FOLDER, names.of_picture(source, row)))

        each(copy, captioned(tables))
    if not (by_folder or config.beside):
        lines = (line for _, line in _lines(tables, names, by_folder=False))
        return [write_rows(output, f"{FOLDER}/{METADATA}", lines)]
    folders: dict[str, list[bytes]] = {}
    for folder, line in _lines(tables, names, by_folder=by_folder):
        folders.setdefault(folder, []).append(line)
    entries = []
    for folder, some in sorted(folders.items()):
        path = posixpath.join(folder, METADATA)
        if not config.beside:
            entries.append(write_rows(output, f"{FOLDER}/{path}", some))
        elif not create(
            place := posixpath.join(storage.absolute(config.images), path), b"".join(some)
        ):
            logger.warning("%s is there already, and was left as it is", place)
    return entries


def _lines(tables: Tables, names: Names, *, by_folder: bool) -> Iterator[tuple[str, bytes]]:
    """The folder of a metadata file, and a line of it."""
    for source, row in captioned(tables):
        path = _path(names, source, row)
        folder = posixpath.dirname(path) if by_folder else ""
        name = posixpath.relpath(path, folder) if folder else path
        (line,) = json_lines([{"file_name": name, "text": row["caption"]}])
        yield folder, line


def _paths(tables: Tables, names: Names) -> Iterator[str]:
    for entry in tables.entries():
        for table in tables.rows([entry], PLACES):
            for row in table.to_pylist():
                yield _path(names, tables.source(entry), row)


def _path(names: Names, source: SourceIdentity, row: Row) -> str:
    """Relative to the imagefolder."""
    return names.of_picture(source, row).removeprefix(f"{source.uri}/")


def _says_split(path: str) -> str:
    """What of a path does."""
    folder, name = posixpath.split(path)
    return "folder" if _SPLIT.search(folder) else "file" if _SPLIT.search(name) else "nothing"


def _unsaid(path: str) -> str:
    return _SPLIT.sub(r"\2~", path)
