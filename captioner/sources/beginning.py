"""The listing that a run began with, kept until it has published: it goes on with that, whatever comes or goes."""

import json
import logging
from collections.abc import Iterator, Sequence
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
_ROWS = pa.schema(
    [
        pa.field(
            "image_id", pa.string()
        ),  # null where it is the path, or where a file holds many images
        pa.field("path", pa.string(), nullable=False),
        pa.field("size", pa.int64()),
        pa.field("mtime", pa.int64()),
    ]
)
_BATCH = 50_000


@dataclass(frozen=True)
class Beginning:
    """What a run's source was when it began."""

    uri: str
    """Of the source."""
    kind: str
    """Of the source, too."""
    files: list[storage.FileInfo]
    """Those with images, as paths below the source."""
    ids: dict[str, str]
    """By path, of files that are an image each."""
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
    files, ids = [], {}
    for batch in table.to_batches(_BATCH):
        for name, path, size, mtime in zip(*batch.to_pydict().values(), strict=True):
            files.append(storage.FileInfo(f"{uri}/{path}", path, size, mtime))
            ids[path] = name or path
    return Beginning(uri, about["kind"], files, ids, about["left_out"])


def _open(place: str) -> tuple[pa.Table, dict[str, Any]]:
    """A kept listing, and what is said of it."""
    with storage.reading(place), storage.open_input(place) as handle:
        table = pq.read_table(handle)
    try:
        return table, json.loads(table.schema.metadata[_ABOUT])
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{place} is damaged: --restart begins anew") from error


def describe_change(then: Sequence[storage.FileInfo], now: Sequence[storage.FileInfo]) -> str:
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
        "%s changed since %s was published, which stays as it is. One that --extends it by what is new cannot be made "
        "yet: give another --output to begin anew",
        "the images have" if then.listing != now.listing else "captions or splits have",
        output,
    )


def _states(files: Sequence[storage.FileInfo]) -> Iterator[list[str]]:
    for start in range(0, len(files), _BATCH):
        yield [f"{f.path}\n{f.size}\n{f.mtime}" for f in files[start : start + _BATCH]]


def _batches(files: Iterator[Listed]) -> Iterator[pa.RecordBatch]:
    while some := list(islice(files, _BATCH)):
        rows = [(name if name != f.path else None, f.path, f.size, f.mtime) for name, f in some]
        yield pa.record_batch([list(column) for column in zip(*rows, strict=True)], schema=_ROWS)
