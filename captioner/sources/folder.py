"""A folder of images, or one image, with a captions file or without."""

import hashlib
import json
import math
import posixpath
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import pyarrow as pa
import ray
from pyarrow.fs import FileSystem, FileType

from captioner import storage
from captioner.artifacts.id_set import NONE, IdSet
from captioner.artifacts.manifests import SourceIdentity
from captioner.artifacts.tables import CAPTION_ROWS, FINAL
from captioner.config import Split
from captioner.errors import OutOfReachError, SourceError
from captioner.images.load import HEIF_EXTRA, has_loader, sniff_format
from captioner.sources.base import Listed
from captioner.sources.columns import IMAGE_SUFFIX
from captioner.sources.nearby import SIDECARS, TABLES, Nearby, find_captions
from captioner.sources.outage import RETRY_SECONDS, Outage, kind_of, reason_of
from captioner.sources.place import Place, suffix_of
from captioner.sources.splits import hashed_split, split_of_folder, split_of_list, splits_called
from captioner.sources.tasks import BYTES_PER_PIECE, Piece, PieceSource, source_rows
from captioner.storage.faults import Fault, fault_of

MOST_ROWS_PER_PIECE = 64
LEAST_ROWS_PER_PIECE = 8
_CAPTIONS_PER_BATCH = 10_000
OPTIONS = frozenset(
    (
        "captions",
        "image_column",
        "caption_columns",
        "split_column",
        "id_column",
        "encoding",
        "missing",
        "sniff",
        "exclude",
        "split",
        "limit",
    )
)
"""Settings of ``SourceConfig`` that say something here."""


def open_place(place: Place) -> "FolderSource | None":
    """A directory with images, or one file."""
    if place.files is None:
        return FolderSource(place.uri, [_single(place.uri)], {}, place, single=True)
    sniffed: set[str] = set()
    if place.options.sniff:
        unknown = [file for file in place.files if not _is_known(file.path)]
        sniffed.update(file.path for file in _sniff(unknown))
    images = place.taken("folder", lambda path: is_image(path) or path in sniffed)
    return FolderSource(place.uri, images, place.left_out, place) if images else None


@dataclass(frozen=True)
class _Row:
    """An image that is taken."""

    image_id: str
    file: storage.FileInfo
    split: Split


class FolderSource:
    """Image files below a folder, or one image; an image's id is its path relative to the folder.

    Splits come from the captions files, from Flickr8k's lists (``Flickr_8k.trainImages.txt`` ...) beside them, or from
    folders called train, val or test. An image that these leave out gets the configured split, and by default trains:
    it must not join a published test split. Where there is none of these, captioned images are split 80/10/10 by a hash
    of the id; where there are no captions, all are ``test``.
    """

    def __init__(
        self,
        uri: str,
        images: list[storage.FileInfo],
        left_out: dict[str, int],
        place: Place,
        *,
        single: bool = False,
    ):
        """
        Args:
            images: their paths are relative to ``uri``.
            left_out: what the listing passed over, by kind.
            single: ``uri`` is itself the image, or a list of images wherever they are.

        Raises:
            SourceError: the captions cannot be read, or name an image that is not there.
        """
        self.uri = uri
        self.options = place.options
        self.limits = place.limits
        self._single = single
        taken = {file.path for file in images}
        others = [
            file for file in place.files or () if file.path not in taken and not is_image(file.path)
        ]
        found = Nearby()
        if place.captions or place.options.id_column:
            # Captions of pictures that came after the run began are no mistake.
            today = (f.path for f in place.files or () if place.beginning and is_image(f.path))
            found = find_captions(uri, others, sorted(taken.union(today)), place.options)
        self._captions = found.captions if place.captions else {}
        splits = self._splits(found, images, others) if place.captions else {}
        begun = place.beginning
        ids = self._ids(found, images) if begun is None else begun.ids
        # A run that goes on has chosen.
        limit = self.options.limit if begun is None else None
        self._rows = self._choose(images, splits, ids, limit)
        if begun is not None:
            self._left_out = begun.left_out
            return
        kinds = Counter(left_out)
        read = set(found.files)
        kinds.update("captions file" if file.uri in read else _kind(file.path) for file in others)
        kinds["missing picture"] = found.missing
        kinds["over the limit"] = len(images) - len(self._rows)
        self._left_out = {kind: count for kind, count in kinds.most_common() if count}

    def identity(self) -> SourceIdentity:
        listing, captions = hashlib.sha256(), hashlib.sha256()
        for row in self._rows:
            file = row.file
            state = [row.image_id, file.path, file.size, file.mtime]
            listing.update(json.dumps(state).encode())
            captions.update(json.dumps([row.split, self._captions.get(file.path)]).encode())
        return SourceIdentity(
            kind="folder",
            uri=self.uri,
            options={"limit": self.options.limit, "id_column": self.options.id_column},
            listing=listing.hexdigest(),
            captions=captions.hexdigest(),
        )

    def files(self) -> Iterator[Listed]:
        for row in () if self._single else self._rows:
            yield row.image_id, row.file

    def num_images(self) -> int:
        return len(self._rows)

    def left_out(self) -> dict[str, int]:
        return dict(self._left_out)

    def images(self, done: IdSet = NONE, /, *, retry_seconds: float = RETRY_SECONDS) -> PieceSource:
        # Two tasks for each CPU at least, so that a small folder too is read and loaded by all of them.
        cpus = int(ray.cluster_resources().get("CPU", 1)) if ray.is_initialized() else 1
        left = ~done.holds([row.image_id for row in self._rows])
        rows = [row for row, wanted in zip(self._rows, left, strict=True) if wanted]
        most = math.ceil(len(rows) / (2 * cpus))
        most = min(max(most, LEAST_ROWS_PER_PIECE), MOST_ROWS_PER_PIECE)
        # Opened once and sent along: opening S3 may ask it for the bucket's region, and workers may lack its endpoint.
        whole, root = storage.resolve(self.uri)
        pieces: list[Piece] = []
        chosen: list[tuple[_Row, str]] = []
        size = 0
        for number, row in enumerate(rows, 1):
            # Files of a list may lie anywhere.
            here = (
                storage.resolve(row.file.uri)
                if self._single
                else (whole, f"{root}/{row.file.path}")
            )
            filesystem, path = here
            chosen.append((row, path))
            size += min(row.file.size, self.limits.max_bytes)
            last = number == len(rows) or (
                self._single and not filesystem.equals(storage.resolve(rows[number].file.uri)[0])
            )
            if len(chosen) == most or size >= BYTES_PER_PIECE // 2 or last:
                read = partial(_read, chosen, filesystem, self.limits.max_bytes, retry_seconds)
                pieces.append(Piece(read, len(chosen), size))
                chosen, size = [], 0
        return PieceSource("Folder", pieces)

    def captions(self) -> Iterator[pa.RecordBatch]:
        rows = []
        for row in self._rows:
            texts: list[str | None] = [*self._captions.get(row.file.path, [])] or [None]
            for index, caption in enumerate(texts):
                head = {"image_id": row.image_id, "split": row.split, "caption": caption}
                rows.append({**head, "index": None if caption is None else index})
            if len(rows) >= _CAPTIONS_PER_BATCH:
                yield pa.RecordBatch.from_pylist(rows, CAPTION_ROWS)
                rows = []
        if rows:
            yield pa.RecordBatch.from_pylist(rows, CAPTION_ROWS)

    def _splits(
        self, found: Nearby, images: list[storage.FileInfo], others: list[storage.FileInfo]
    ) -> dict[str, Split]:
        """The split of each image that has one, by its path."""
        listed = _listed_splits(others)
        called = splits_called(found.splits.values(), self.uri)
        splits: dict[str, Split] = {}
        for file in images:
            split = called.get(found.splits.get(file.path, ""))
            split = split or listed.get(posixpath.basename(file.path))
            if split is None and self._captions and file.path not in found.splits:
                split = split_of_folder(file.path)
            if split is not None:
                splits[file.path] = split
        return splits

    def _ids(self, found: Nearby, images: list[storage.FileInfo]) -> dict[str, str]:
        """The user's own id of each image by its path; the path itself where no column of ids was asked for."""
        if self.options.id_column is None:
            return {file.path: file.path for file in images}
        owners: dict[str, str] = {}
        for file in images:
            own = found.ids.get(file.path)
            if own is None:
                raise SourceError(f"source-options.id-column: image {file.path} has no id")
            if owners.setdefault(own, file.path) != file.path:
                raise SourceError(
                    f"source-options.id-column: {owners[own]} and {file.path} have the same id {own!r}"
                )
        return {path: own for own, path in owners.items()}

    def _choose(
        self,
        images: list[storage.FileInfo],
        splits: dict[str, Split],
        ids: dict[str, str],
        limit: int | None,
    ) -> list[_Row]:
        """The images taken, each with its split."""
        taken: dict[Split, int] = {}
        rows = []
        for file in images:
            image_id = ids[file.path]
            split = splits.get(file.path) or self._default_split(image_id, bool(splits))
            taken[split] = taken.get(split, 0) + 1
            if limit is None or taken[split] <= limit:
                rows.append(_Row(image_id, file, split))
        return rows

    def _default_split(self, image_id: str, others_have_one: bool) -> Split:
        if self.options.split != "auto":
            return self.options.split
        if others_have_one:
            return "train"
        return hashed_split(image_id) if self._captions else "test"


def is_image(path: str) -> bool:
    """Whether a file is taken for a picture that can be loaded here, by its suffix."""
    base = posixpath.basename(path)
    return IMAGE_SUFFIX.fullmatch(base) is not None and (has_loader("HEIF") or not _is_heif(base))


def _is_heif(path: str) -> bool:
    return path.lower().endswith((".heic", ".heif", ".hif"))


def _is_known(path: str) -> bool:
    """Whether a suffix says what a file is, and what it says is right."""
    return IMAGE_SUFFIX.fullmatch(path) is not None or path.lower().endswith(
        (
            *TABLES,
            *SIDECARS,
            ".tar",
            ".md",
            ".html",
            ".xml",
            ".yaml",
            ".yml",
            ".py",
            ".pdf",
            ".zip",
            ".mp4",
            ".mov",
        )
    )


def _sniff(files: list[storage.FileInfo]) -> list[storage.FileInfo]:
    """Those whose content is a picture's that can be loaded here."""

    def is_picture(file: storage.FileInfo) -> bool:
        with storage.open_input(file.uri) as handle:
            found = sniff_format(handle.read(64))
        return found is not None and (found != "image/heic" or has_loader("HEIF"))

    with ThreadPoolExecutor(16) as pool:
        return [file for file, fine in zip(files, pool.map(is_picture, files), strict=True) if fine]


def _kind(path: str) -> str:
    """What a file that is left out is counted as."""
    suffix = suffix_of(path)
    return f"{suffix} (needs the extra {HEIF_EXTRA})" if _is_heif(path) else suffix


def _single(uri: str) -> storage.FileInfo:
    filesystem, path = storage.resolve(uri)
    info = filesystem.get_file_info(path)
    return storage.FileInfo(uri, posixpath.basename(path), info.size, info.mtime_ns)


def _listed_splits(files: list[storage.FileInfo]) -> dict[str, Split]:
    """Splits by Flickr8k's lists of base names."""
    listed: dict[str, Split] = {}
    for file in files:
        if split := split_of_list(file.path):
            for name in storage.read_bytes(file.uri).decode("utf-8", "replace").split():
                if listed.setdefault(name, split) != split:
                    raise SourceError(f"{file.uri}: {name} is in the {listed[name]} list too")
    return listed


def _read(
    placed: list[tuple[_Row, str]], filesystem: FileSystem, max_bytes: int, retry_seconds: float
) -> Iterator[pa.Table]:
    """Images, each with its path on the file system."""
    rows = [row for row, _ in placed]
    data: list[bytes | None] = [None] * len(rows)
    errors: list[str | None] = [None] * len(rows)
    kinds: list[str | None] = [None] * len(rows)
    files = [row.file for row in rows]
    waiting: deque[int] = deque()
    for number, file in enumerate(files):
        if file.size <= max_bytes:
            waiting.append(number)
            continue
        errors[number] = f"{file.size} bytes, over the limit of {max_bytes}"
        kinds[number] = FINAL
    outage = Outage(retry_seconds)
    while waiting:
        number = waiting.popleft()
        try:
            with filesystem.open_input_file(placed[number][1]) as handle:
                data[number] = handle.read()
            outage.over()
        except (OSError, pa.ArrowException) as problem:
            error: Exception = problem
            path = placed[number][1]
            root = path.removesuffix(f"/{files[number].path}")
            if fault_of(problem) == Fault.ABSENT and root != path and _is_gone(filesystem, root):
                error = OutOfReachError(f"{root} is gone")  # a disk, say, and not its pictures
            # Another one comes next: what fails alone keeps nobody waiting.
            waiting.append(number)
            if outage.wait(error, files[number].uri):
                continue
            # Of an outage that lasts, all that is left hears the same.
            kind = kind_of(error)
            for each in [number] if kind == FINAL else list(waiting):
                waiting.remove(each)
                errors[each], kinds[each] = f"cannot be read: {reason_of(error)}", kind
    yield source_rows(
        [row.image_id for row in rows],
        [file.uri for file in files],
        data,
        errors,
        kinds,
        sizes=[file.size for file in files],
        mtime=[file.mtime for file in files],
    )


def _is_gone(filesystem: FileSystem, root: str) -> bool:
    try:
        return bool(filesystem.get_file_info(root).type == FileType.NotFound)
    except OSError:
        return True
