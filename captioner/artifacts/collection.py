"""The tables of a published collection, wherever the parts that it has grown from lie."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from captioner import storage
from captioner.artifacts.manifests import Collection, FileEntry, SourceIdentity
from captioner.artifacts.tables import REMOVED_ROWS


@dataclass(frozen=True)
class Tables:
    """The rows that count in a collection's tables of one kind."""

    uri: str
    """Of the collection."""
    manifest: Collection
    directory: str

    def entries(self, directory: str | None = None) -> list[FileEntry]:
        """The files of a directory, where they are from anywhere, each with its part.

        Args:
            directory: default: of these tables.
        """
        own = self.manifest.source.key
        return [
            entry.model_copy(update={"path": entry.uri(self.uri), "part": entry.part or own})
            for entry in self.manifest.tables(directory or self.directory)
        ]

    @property
    def sources(self) -> list[SourceIdentity]:
        """Of all pictures."""
        parts = self.manifest.parts.values()
        return [part.source for part in parts] or [self.manifest.source]

    def source(self, entry: FileEntry) -> SourceIdentity:
        """Whose pictures the rows of one of the ``entries`` are about."""
        part = self.manifest.parts.get(entry.part or "")
        return self.manifest.source if part is None else part.source

    @cached_property
    def removed(self) -> dict[str, pa.Array]:
        """By file, ids of the rows that no longer count."""
        entry = self.manifest.removed
        if entry is None:
            return {}
        place = entry.uri(self.uri)
        with storage.reading(place), storage.open_input(place) as handle:
            table = pq.read_table(handle, columns=REMOVED_ROWS.names)
        return {
            FileEntry(path=file, bytes=0).uri(self.uri): table.filter(
                pc.equal(table["file"], file)
            )["image_id"].combine_chunks()
            for file in table["file"].unique().to_pylist()
        }

    def rows(self, entries: Sequence[FileEntry], schema: pa.Schema) -> Iterator[pa.Table]:
        """Rows that count, a table a file; nulls in columns that a file does not have.

        Raises:
            StoreError: a file is missing or damaged.
        """
        for entry in entries:
            table = self.read(entry, schema)
            if (gone := self.removed.get(entry.path)) is not None:
                gone = gone.cast(table["image_id"].type)
                table = table.filter(pc.invert(pc.is_in(table["image_id"], gone)))
            yield table

    def read(self, entry: FileEntry, schema: pa.Schema) -> pa.Table:
        """All rows of a file, those that no longer count as well.

        Raises:
            StoreError: it is missing or damaged.
        """
        with storage.reading(entry.path), storage.open_input(entry.path) as handle:
            there = pq.read_schema(handle).names
            columns = [name for name in schema.names if name in there]
            table = pq.read_table(handle, columns=columns, page_checksum_verification=True)
        for field in schema:
            if field.name not in there:
                table = table.append_column(field, pa.nulls(len(table), field.type))
        return table.select(schema.names).cast(schema)
