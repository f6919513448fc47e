"""What files are called that are written of one picture each."""

import hashlib
import posixpath
import re
from collections.abc import Callable

import pyarrow as pa
import pyarrow.compute as pc

from captioner.artifacts.collection import Tables
from captioner.artifacts.manifests import SourceIdentity
from captioner.artifacts.tables import CAPTIONED_ROWS
from captioner.captioning.rows import Row

PLACES = pa.schema([CAPTIONED_ROWS.field("image_id"), CAPTIONED_ROWS.field("uri")])
# Of a file's name, in bytes.
_LONGEST = 255


class Names:
    """Paths of what is written of a picture: like the picture's own, and for each another."""

    def __init__(
        self, tables: Tables, *, beside: bool, edit: Callable[[str], str] = lambda path: path
    ):
        """
        Args:
            beside: what is written lies next to the pictures, so paths are theirs, absolute, whatever their ids.
            edit: changes paths of others.
        """
        self._beside, self._edit = beside, edit
        found, stems = [], []
        for entry in tables.entries():
            source = tables.source(entry)
            for table in tables.rows([entry], PLACES):
                paths = [self._path(source, row) for row in table.to_pylist()]
                found.append(pa.array(paths, pa.string()))
                stems.append(pa.array([_stem(path) for path in paths], pa.string()))
        whole = pa.chunked_array(found, pa.string())
        self._several = _of_several(whole)
        short = pa.chunked_array(stems, pa.string())
        taken = pc.is_in(short, value_set=pc.utf8_lower(whole))
        self._shared = _of_several(short) | set(short.filter(taken).to_pylist())

    def of_picture(self, source: SourceIdentity, row: Row) -> str:
        """The picture's own, or that of a copy."""
        path = self._path(source, row)
        folder, name = posixpath.split(path)
        if path in self._several or len(name.encode()) > _LONGEST:
            return posixpath.join(
                folder, _digest_name(row["image_id"], posixpath.splitext(name)[1])
            )
        return path

    def of_sidecar(self, source: SourceIdentity, row: Row, suffix: str) -> str:
        """The picture's with another suffix, or, where others have that, too, with one more."""
        path = self.of_picture(source, row)
        if _stem(path) not in self._shared:
            path = posixpath.splitext(path)[0]
        folder, name = posixpath.split(path + suffix)
        if len(name.encode()) > _LONGEST:
            name = _digest_name(row["image_id"], suffix)
        return posixpath.join(folder, name)

    def _path(self, source: SourceIdentity, row: Row) -> str:
        """The picture's below its source, as a relative path that leads nowhere else; its id, where it is no file."""
        path: str = row["uri"]
        if self._beside:
            return path
        path, prefix = row["image_id"], str(source.options.get("id_prefix") or "")
        # Of a folder; of one picture, or a list of some.
        for root in (source.uri, posixpath.dirname(source.uri)) if source.kind == "folder" else ():
            if row["uri"].startswith(f"{root}/"):
                path = prefix + row["uri"][len(root) + 1 :]
                break
        parts = [re.sub(r"[\0-\x1f]", "_", part) for part in path.split("/")]
        return self._edit("/".join("_" if part in ("", ".", "..") else part for part in parts))


def _stem(path: str) -> str:
    """Without suffix, as far as file systems tell names apart that ignore the case."""
    return posixpath.splitext(path)[0].lower()


def _digest_name(image_id: str, suffix: str) -> str:
    return hashlib.sha256(image_id.encode()).hexdigest()[:32] + suffix


def _of_several(names: pa.ChunkedArray) -> set[str]:
    counts = pc.value_counts(names)
    several = counts.filter(pc.greater(counts.field("counts"), 1))
    return set(several.field("values").to_pylist())
