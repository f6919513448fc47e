"""What a user named as a source, and the files that lie there."""

import logging
import posixpath
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from captioner import storage
from captioner.artifacts.output import CLAIM
from captioner.config import ImageLimits, SourceConfig
from captioner.errors import SourceError, StoreError
from captioner.sources.beginning import Beginning, describe_change, read_beginning
from captioner.sources.listing import list_place

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """A source that is asked for, before it is known what kind it is."""

    spec: str
    """As the user gave it."""
    options: SourceConfig
    limits: ImageLimits
    captions: bool
    """Whether captions are wanted, and splits in files beside the images."""
    output: str | None = None
    """Where the run writes that the source is opened for: it goes on with the files that it began with."""

    @cached_property
    def uri(self) -> str:
        return storage.absolute(self.spec)

    @property
    def files(self) -> storage.FileTable | None:
        """The visible files of a directory, sorted; None of a single file.

        Raises:
            SourceError: nothing is there, or it cannot be listed.
        """
        return self._listed[0]

    @cached_property
    def beginning(self) -> Beginning | None:
        """What the run began with, where it has begun.

        Raises:
            StoreError: it cannot be read.
        """
        return None if self.output is None else read_beginning(self.output, self.uri)

    def or_begun(self, kind: str, today: storage.FileTable) -> storage.FileTable:
        """Today's files with images, or those that the run began with, of a source of the ``kind``."""
        begun = self.beginning
        if begun is None:
            return today
        if begun.kind != kind:
            return storage.FileTable(self.uri, ())
        if change := describe_change(begun.files, today):
            logger.info("%s: %s; the run goes on with what it began with", self.spec, change)
        return begun.files

    def taken(self, kind: str, wanted: Callable[[str], bool]) -> list[storage.FileInfo]:
        """The same of files that hold many images each, by their paths."""
        today = (file for file in self.files or () if wanted(file.path))
        return list(self.or_begun(kind, storage.FileTable.collect(self.uri, today)))

    def check_unchanged(self, taken: list[storage.FileInfo]) -> None:
        """Where a file holds many pictures, it may be no other than the one that a run began with.

        Raises:
            SourceError: one is gone, or another.
        """
        paths = {file.path for file in taken}
        today = {file.path: file.size for file in self.files or () if file.path in paths}
        for file in taken:
            if self.beginning is not None and today.get(file.path) != file.size:
                raise SourceError(
                    f"{file.uri} is gone or another since the run began: put it back, or use another output"
                )

    @property
    def left_out(self) -> dict[str, int]:
        """What else the listing found, by kind."""
        return dict(self._listed[1])

    @cached_property
    def _listed(self) -> tuple[storage.FileTable | None, dict[str, int]]:
        """The visible files of a directory, None of a file; and what else is there."""
        try:
            if not storage.exists(self.uri):
                hub = re.fullmatch(r"[\w-]+/[\w.-]+", self.spec)
                raise SourceError(
                    f"{self.spec}: no such file or directory, nor one of shapes, flickr8k, flickr30k"
                    + (f"; of the hub it would be hf:{self.spec}" if hub else "")
                )
            if storage.is_file(self.uri):
                return None, {}
            if not storage.is_directory(self.uri):
                raise SourceError(f"{self.spec}: neither a file nor a directory")
            if storage.exists(storage.join(self.uri, CLAIM)):
                raise SourceError(
                    f"{self.spec}: written by a job of this package: not a source of images"
                )
            return list_place(self.uri, self.options.exclude)
        except OSError as error:
            raise SourceError(f"{self.spec}: {error.strerror}") from error
        except StoreError as error:
            raise SourceError(f"{self.spec}: {error}") from error


def suffix_of(path: str) -> str:
    """Of a file's name, in lower case."""
    return posixpath.splitext(path)[1].lower() or "no suffix"
