"""What a user named as a source, and the files that lie there."""

import posixpath
from dataclasses import dataclass
from functools import cached_property

from captioner import storage
from captioner.artifacts.output import CLAIM
from captioner.config import ImageLimits, SourceConfig
from captioner.errors import SourceError, StoreError
from captioner.sources.listing import list_place


@dataclass(frozen=True)
class Place:
    """A source that is asked for, before it is known what kind it is."""

    spec: str
    """As the user gave it."""
    options: SourceConfig
    limits: ImageLimits
    captions: bool
    """Whether captions are wanted, and splits in files beside the images."""

    @cached_property
    def uri(self) -> str:
        return storage.absolute(self.spec)

    @property
    def files(self) -> list[storage.FileInfo] | None:
        """The visible files of a directory, sorted; None of a single file.

        Raises:
            SourceError: nothing is there, or it cannot be listed.
        """
        return self._listed[0]

    @property
    def left_out(self) -> dict[str, int]:
        """What else the listing found, by kind."""
        return dict(self._listed[1])

    @cached_property
    def _listed(self) -> tuple[list[storage.FileInfo] | None, dict[str, int]]:
        """The visible files of a directory, None of a file; and what else is there."""
        try:
            if not storage.exists(self.uri):
                raise SourceError(
                    f"{self.spec}: no such file or directory, nor one of shapes, flickr8k, flickr30k"
                )
            if not storage.is_directory(self.uri):
                return None, {}
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
