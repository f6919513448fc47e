"""Names in a captions file -> the images they mean."""

import posixpath
import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable

from captioner.errors import SourceError
from captioner.sources.columns import IMAGE_SUFFIX


class ImageNames:
    """The images of a source by every name that a captions file may have for them.

    Such a name is the image's path or the end of one, with its suffix or without: ``1.jpg`` or ``1`` for
    ``train/1.jpg``. Names are compared in NFC.
    """

    def __init__(self, paths: Iterable[str]):
        self._paths: dict[str, list[str]] = defaultdict(list)
        self._by_base: dict[str, list[str]] = defaultdict(list)
        for path in paths:
            composed = unicodedata.normalize("NFC", path)
            self._paths[composed].append(path)
            base = posixpath.basename(composed)
            self._by_base[base].append(path)
            stem = posixpath.splitext(base)[0]
            if stem != base:
                self._by_base[stem].append(path)

    def match(
        self, names: Collection[str], folder: str | None = None
    ) -> tuple[dict[str, str], list[str]]:
        """Images by name, and the names of images that are not there.

        Where no name fits with the folder that it gives, the names are those of a tree in which this one lies deeper:
        ``flickr30k-images/1.jpg`` is then ``1.jpg``.

        Args:
            folder: where the names were found, relative to the images' root; names may be relative to it.

        Raises:
            SourceError: a name fits several images, or several names fit one.
        """
        found = {name: path for name in names if (path := self._find(name, folder))}
        absent = [name for name in names if name not in found]
        if not found:
            cut = {name: path for name in absent if (path := self._find_deeper(name))}
            if len({*cut.values(), *found.values()}) == len(cut) + len(found):
                found |= cut
                absent = [name for name in absent if name not in cut]
        taken: dict[str, str] = {}
        for name, path in found.items():
            if path in taken:
                raise SourceError(
                    f"captions for image {path} are given twice, as {taken[path]} and as {name}"
                )
            taken[path] = name
        return found, absent

    def _find(self, name: str, folder: str | None) -> str | None:
        name = _plain(name)
        for exact in ([posixpath.join(folder, name)] if folder else []) + [name]:
            if len(same := self._paths.get(exact, [])) == 1:
                return same[0]
        ends = [
            path for path in self._by_base.get(posixpath.basename(name), ()) if _ends(path, name)
        ]
        if len(ends) > 1:
            raise SourceError(
                f"captions for image {name}, which two images could be: {ends[0]}, {ends[1]}"
            )
        return ends[0] if ends else None

    def _find_deeper(self, name: str) -> str | None:
        parts = _plain(name).split("/")
        for start in range(1, len(parts)):
            if len(same := self._paths.get("/".join(parts[start:]), [])) == 1:
                return same[0]
        return None


def _plain(name: str) -> str:
    """A name as a path below the root: Windows' separators, ``./`` and a leading ``/`` are undone."""
    if "\\" in name and IMAGE_SUFFIX.fullmatch(name):
        name = name.replace("\\", "/")
    return re.sub(r"^(\.?/)+", "", name)


def _ends(path: str, name: str) -> bool:
    path = unicodedata.normalize("NFC", path)
    return any(f"/{one}".endswith(f"/{name}") for one in (path, posixpath.splitext(path)[0]))
