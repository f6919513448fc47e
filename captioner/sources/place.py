"""What a user named as a source, and the files that lie there."""

import posixpath
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from captioner import storage
from captioner.artifacts.output import CLAIM
from captioner.config import ImageLimits, SourceConfig
from captioner.errors import SourceError, StoreError


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
    def hidden(self) -> int:
        """How many files of the directory are passed over: hidden ones (a name or directory that begins with a dot),
        those in directories that begin with ``_``, and what a job of this package wrote."""
        return self._listed[1]

    def others(self, taken: Callable[[str], bool]) -> dict[str, int]:
        """Files whose paths are not taken, by kind, the commonest first: a suffix, or that they are hidden."""
        paths = (file.path for file in self.files or ())
        kinds = Counter(_suffix(path) for path in paths if not taken(path))
        kinds["hidden"] = self.hidden
        return {kind: count for kind, count in kinds.most_common() if count}

    @cached_property
    def _listed(self) -> tuple[list[storage.FileInfo] | None, int]:
        return _list(self.spec, self.uri)


def _list(spec: str, uri: str) -> tuple[list[storage.FileInfo] | None, int]:
    """The visible files of a directory, None when ``uri`` is a file; and how many others there are."""
    try:
        if not storage.exists(uri):
            raise SourceError(
                f"{spec}: no such file or directory, nor one of shapes, flickr8k, flickr30k"
            )
        if not storage.is_directory(uri):
            return None, 0
        files = storage.list_files(uri)
    except UnicodeDecodeError as error:
        raise SourceError(f"{spec}: holds a file whose name is not UTF-8: rename it") from error
    except (StoreError, OSError) as error:
        raise SourceError(f"{spec}: {' '.join(str(error).split())}") from error
    written = [
        posixpath.dirname(file.path) for file in files if posixpath.basename(file.path) == CLAIM
    ]
    if "" in written:
        raise SourceError(f"{spec}: written by a job of this package: not a source of images")
    inside = tuple(f"{directory}/" for directory in written)
    visible = [f for f in files if _is_visible(f.path) and not f.path.startswith(inside)]
    return visible, len(files) - len(visible)


def _suffix(path: str) -> str:
    return posixpath.splitext(path)[1].lower() or "no suffix"


def _is_visible(path: str) -> bool:
    *directories, name = path.split("/")
    # Cameras name pictures _DSC0001.JPG: "_" hides directories only (_temporary, _delta_log).
    return not (
        name.startswith(".") or any(directory.startswith((".", "_")) for directory in directories)
    )
