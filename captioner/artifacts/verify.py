"""Whether a published directory is whole: every file of its manifest, its size, digest, rows and checksums."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from captioner import storage
from captioner.artifacts.manifests import (
    MANIFEST,
    Collection,
    FileEntry,
    Manifest,
    open_manifest,
)
from captioner.storage.faults import Fault, fault_of, one_line, told

# Files read at a time: an object store answers late, and one row group of each is in memory.
_READERS = 4


@dataclass(frozen=True)
class Verification:
    """What was found in a published directory."""

    uri: str
    manifest: Manifest
    files: int
    """Listed in the manifest."""
    rows: int
    """Of the tables that could be read."""
    problems: list[str]
    """A line each."""

    @property
    def summary(self) -> str:
        found = f"{len(self.problems)} damaged" if self.problems else "sound"
        return f"{self.uri}: {self.files:,} files, {self.rows:,} rows: {found}"


def verify(uri: str) -> Verification:
    """Read every file that the manifest of ``uri`` lists, those of older parts of a growing collection too.

    Raises:
        StoreError: it is no published directory, its manifest cannot be read, or access is denied.
        OutOfReachError: the store does not answer.
    """
    uri = storage.absolute(uri)
    manifest = open_manifest(uri, Manifest)
    entries = list(manifest.files)
    if isinstance(manifest, Collection) and manifest.removed is not None:
        entries.append(manifest.removed)
    with ThreadPoolExecutor(_READERS) as readers:
        found = list(readers.map(lambda entry: _verify_file(entry, uri), entries))
    problems = [
        f"{entry.uri(uri)}: {problem}"
        for entry, (_, problem) in zip(entries, found, strict=True)
        if problem is not None
    ]
    if isinstance(manifest, Collection):
        problems += _verify_counts(manifest, uri)
    return Verification(uri, manifest, len(entries), sum(rows for rows, _ in found), problems)


def _verify_counts(manifest: Collection, uri: str) -> list[str]:
    """Whether the files that the manifest lists hold a row for each picture that it counts."""
    rows = sum(entry.rows or 0 for entry in manifest.tables(manifest.kind))
    if manifest.removed is not None:
        rows -= manifest.removed.rows or 0
    if rows == manifest.counts.images:
        return []
    place = storage.join(uri, MANIFEST)
    return [f"{place}: {rows:,} rows of {manifest.kind}, but {manifest.counts.images:,} pictures"]


def _verify_file(entry: FileEntry, root: str) -> tuple[int, str | None]:
    """Rows read, and what is wrong."""
    rows = entry.rows or 0
    try:
        filesystem, path = storage.resolve(entry.uri(root))
        info = filesystem.get_file_info(path)
        if info.type != pafs.FileType.File:
            return 0, "missing"
        if info.size != entry.bytes:
            return 0, f"{info.size:,} bytes, not {entry.bytes:,}"
        with filesystem.open_input_file(path) as file:
            if entry.sha256 is not None and _sha256(file) != entry.sha256:
                return 0, "its SHA-256 is not the manifest's"
            if path.endswith(".parquet"):
                rows = _read_rows(file)
    except (OSError, pa.ArrowException) as error:
        if fault_of(error) in (Fault.PASSING, Fault.DENIED):
            raise told("read", entry.uri(root), error) from error
        return 0, f"cannot be read: {one_line(error)}"
    if entry.rows is not None and rows != entry.rows:
        return rows, f"{rows:,} rows, not {entry.rows:,}"
    return rows, None


def _sha256(file: pa.NativeFile) -> str:
    digest = hashlib.sha256()
    while piece := file.read(2**24):
        digest.update(piece)
    file.seek(0)
    return digest.hexdigest()


def _read_rows(file: pa.NativeFile) -> int:
    table = pq.ParquetFile(file, page_checksum_verification=True)
    groups = range(table.num_row_groups)
    return sum(len(table.read_row_group(group, use_threads=False)) for group in groups)
