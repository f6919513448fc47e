"""What every source of images and captions promises to the extraction and captioning jobs."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

import pyarrow as pa

from captioner.artifacts.id_set import NONE, IdSet
from captioner.artifacts.manifests import SourceIdentity
from captioner.sources.outage import RETRY_SECONDS
from captioner.storage import FileInfo

if TYPE_CHECKING:  # ray.data takes seconds, which the parsers beside this file can do without
    from captioner.sources.tasks import PieceSource


# A file, and the id of the image that it is; None where it holds many.
Listed = tuple[str | None, FileInfo]


class Source(Protocol):
    """Images, and captions if there are any, under stable ids.

    ``image_id`` is unique in the source and the same in every run: row checkpointing and resume rest on it.
    """

    def identity(self) -> SourceIdentity:
        """What the images are, and digests of their listing and of their captions."""
        ...

    def files(self) -> Iterator[Listed]:
        """The files of a place that may change: what a run keeps of its source when it begins."""
        ...

    def states(self) -> Iterator[pa.RecordBatch]:
        """Batches of ``tables.STATES``: every image with what its place says of it, null where that says nothing; an
        image of which these are what they were counts as the same."""
        ...

    def num_images(self) -> int:
        """Number of images, read from metadata or a listing (never by reading the images)."""
        ...

    def images(
        self, done: IdSet = NONE, /, *, retry_seconds: float = RETRY_SECONDS
    ) -> "PieceSource":
        """A Ray Data datasource that emits ``tables.SOURCE_ROWS`` of all images but those that are ``done``, which are
        not read either.

        An unreadable file is a row with null ``bytes``, an ``error`` and its kind, never an exception.

        Args:
            retry_seconds: how long a task waits while the store is out of reach.

        Raises:
            StoreError: in a task: a remote store denies access.
        """
        ...

    def captions(self) -> Iterator[pa.RecordBatch]:
        """Batches of ``tables.CAPTION_ROWS``, in a fixed order: every image with its split, the captions of an image
        numbered from 0 and together.

        Raises:
            SourceError: the captions cannot be read.
        """
        ...

    def left_out(self) -> dict[str, int]:
        """How many files were found and are not among the images, by kind."""
        ...
