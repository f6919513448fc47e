"""A store that has grown, as one: the rows that count, in files of its own, and nothing encoded again."""

import hashlib
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby

import pyarrow.parquet as pq

from captioner import storage
from captioner.artifacts.collection import Tables
from captioner.artifacts.feature_store import FeatureStore
from captioner.artifacts.manifests import FileEntry, StoreManifest
from captioner.artifacts.output import Output, publish_once
from captioner.config import CompactConfig
from captioner.encoders.weights import ENCODER_WEIGHTS
from captioner.errors import StoreError
from captioner.runtime.progress import Ticker

logger = logging.getLogger(__name__)

# Of a file at most, unless one older file has more.
_ROWS, _BYTES = 100_000, 256 * 2**20
_WRITERS = 4


def compact(config: CompactConfig) -> StoreManifest:
    """Publish ``config.features``, older parts included, as a store that needs none of them.

    Goes on where a killed run stopped. What extends the new store may come from any of the old one's sources.

    Raises:
        StoreError: the store is damaged, or the output belongs to another run.
    """
    store = FeatureStore.open(config.features)
    base = Tables(store.uri, store.manifest, "features")

    def fill(output: Output) -> StoreManifest:
        files = [output.write(ENCODER_WEIGHTS, store.read_encoder_weights())]
        for directory in ("features", "captions"):
            files += _write(base, output, directory)
        written = sum(entry.rows or 0 for entry in files if entry.path.startswith("features/"))
        if written != store.manifest.counts.images:
            raise StoreError(
                f"{store.uri} is damaged: {written:,} rows of {store.manifest.counts.images:,} images"
            )
        return store.manifest.model_copy(update={"files": files, "removed": None})

    identity = {
        "job": "compact",
        "features": store.uri,
        "content": hashlib.sha256(store.manifest.model_dump_json().encode()).hexdigest(),
    }
    return publish_once(config.output, identity, StoreManifest, fill, restart=config.restart)


def _write(base: Tables, output: Output, directory: str) -> list[FileEntry]:
    groups = list(_groups(base.entries(directory)))
    done: list[int] = []

    def write(number: int) -> FileEntry:
        path = f"{directory}/part-{number:05d}.parquet"
        if not storage.exists(output.uri(path)):  # whole, where a killed run has written it
            output.check()
            _copy(base, groups[number], output.uri(path))
        place = output.uri(path)
        with storage.reading(place), storage.open_input(place) as handle:
            rows = pq.ParquetFile(handle).metadata.num_rows
            entry = FileEntry(
                path=path, bytes=handle.size(), rows=rows, part=groups[number][0].part
            )
        if directory == "captions":
            data = storage.read_bytes(output.uri(path))
            entry = entry.model_copy(update={"sha256": hashlib.sha256(data).hexdigest()})
        done.append(rows)
        return entry

    def tell() -> None:
        logger.info("%s: %s of %s files", directory, f"{len(done):,}", f"{len(groups):,}")

    with Ticker(tell, 10), ThreadPoolExecutor(_WRITERS) as writers:
        return [entry for entry in writers.map(write, range(len(groups))) if entry.rows]


def _groups(entries: list[FileEntry]) -> Iterator[list[FileEntry]]:
    """Files of one source whose rows share a file."""
    for _, same in groupby(entries, lambda entry: entry.part):
        group: list[FileEntry] = []
        rows = size = 0
        for entry in same:
            if group and (rows + (entry.rows or 0) > _ROWS or size + entry.bytes > _BYTES):
                yield group
                group, rows, size = [], 0, 0
            group.append(entry)
            rows += entry.rows or 0
            size += entry.bytes
        yield group


def _copy(base: Tables, entries: list[FileEntry], target: str) -> None:
    first = entries[0].path
    with storage.reading(first), storage.open_input(first) as handle:
        schema = pq.read_schema(handle)
    with (
        storage.atomic_writer(target) as file,
        pq.ParquetWriter(file, schema, write_page_checksum=True) as writer,
    ):
        for table in base.rows(entries, schema):
            writer.write_table(table.replace_schema_metadata(schema.metadata))
