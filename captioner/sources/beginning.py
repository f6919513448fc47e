"""The listing that a run began with, kept until it has published: it goes on with that, whatever comes or goes."""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from captioner import storage
from captioner.artifacts.id_set import IdSet
from captioner.artifacts.manifests import MANIFEST, SourceIdentity
from captioner.artifacts.output import WORK, Output
from captioner.errors import OutOfReachError, StoreError
from captioner.sources.base import Listed, Source

logger = logging.getLogger(__name__)

_FILE = "listing.parquet"
_ABOUT = b"about"
# The id is null where it is the path, or where a file holds many images.
_ROWS = pa.schema([pa.field("image_id", pa.string()), *storage.FILE_SCHEMA])


@dataclass(frozen=True)
class Beginning:
    """What a run's source was when it began."""

    uri: str
    """Of the source."""
    kind: str
    """Of the source, too."""
    files: storage.FileTable
    """Those with images."""
    ids: pa.ChunkedArray | None
    """Of files that are an image each, where an id is not the path."""
    left_out: dict[str, int]
    """What else was there, by kind."""


def keep_beginning(output: Output, source: Source) -> None:
    """Write what a run begins with, unless that is there already.

    Raises:
        OutOfReachError: another run has begun there since the source was opened, with other files.
    """
    uri, batches = output.work(_FILE), _batches(source.files())
    first, identity = next(batches, None), source.identity()
    if first is None:
        return
    if storage.exists(uri):
        if _open(uri)[1].get("listing") != identity.listing:
            if not storage.is_directory(identity.uri):  # a name, or a list of files
                raise StoreError(
                    f"{output.root}: {identity.uri} has changed since the run began: --restart begins anew"
                )
            raise OutOfReachError(
                f"{output.root}: another run began here with other files: the same command goes on with those"
            )
        return
    about = identity.model_dump(include={"kind", "uri", "listing"})
    about["left_out"] = source.left_out()
    with (
        storage.atomic_writer(uri) as file,
        pq.ParquetWriter(file, _ROWS.with_metadata({_ABOUT: json.dumps(about)})) as writer,
    ):
        for batch in chain([first], batches):
            writer.write_batch(batch)


def read_beginning(output: str, uri: str) -> Beginning | None:
    """What the unfinished run in ``output`` began with, if there is one and it is about the source at ``uri``.

    Raises:
        StoreError: it cannot be read.
    """
    place = storage.join(output, WORK, _FILE)
    if storage.exists(storage.join(output, MANIFEST)) or not storage.exists(place):
        return None
    table, about = _open(place)
    if about["uri"] != uri:
        return None
    ids = table["image_id"] if table["image_id"].null_count < len(table) else None
    files = storage.FileTable(uri, table.drop_columns("image_id").to_batches(storage.BATCH))
    return Beginning(uri, about["kind"], files, ids, about["left_out"])


def _open(place: str) -> tuple[pa.Table, dict[str, Any]]:
    """A kept listing, and what is said of it."""
    try:
        with storage.reading(place), storage.open_input(place) as handle:
            table = pq.read_table(handle)
        return table, json.loads(table.schema.metadata[_ABOUT])
    except (storage.DamagedError, KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{place} is damaged: --restart begins anew") from error


def describe_change(then: storage.FileTable, now: storage.FileTable) -> str:
    """How two listings differ, in a few words; none where they do not."""
    kept, found = (IdSet(_states(files)) for files in (then, now))
    here = sum(int(kept.holds(states).sum()) for states in _states(now))
    new, gone = len(found) - here, len(kept) - here
    counts = ((new, "new or changed"), (gone, "gone or changed"))
    return ", ".join(f"{count:,} files are {what}" for count, what in counts if count)


def tell_change(then: SourceIdentity, now: SourceIdentity, output: str) -> None:
    """Say where the source of a published ``output`` is no longer what it was."""
    if then == now:
        return
    logger.warning(
        "%s changed since %s was published, which stays as it is: --extends %s with another --output takes it up",
        "the images have" if then.listing != now.listing else "captions or splits have",
        output,
        output,
    )


def _states(files: storage.FileTable) -> Iterator[list[str]]:
    for batch in files.batches():
        yield ["\n".join(map(str, row)) for row in zip(*batch.to_pydict().values(), strict=True)]


def _batches(files: Iterator[Listed]) -> Iterator[pa.RecordBatch]:
    while some := list(islice(files, storage.BATCH)):
        ids = pa.array([name if name != file.path else None for name, file in some], pa.string())
        (batch,) = storage.FileTable.collect("", (file for _, file in some)).batches()
        yield pa.record_batch([ids, *batch.columns], schema=_ROWS)
