"""A folder of images, or one image, with a captions file or without."""

import hashlib
import json
import logging
import math
import posixpath
import re
from collections.abc import Iterator
from functools import partial

import pyarrow as pa
import ray
from pyarrow.fs import FileSystem

from captioner import storage
from captioner.artifacts.manifests import SourceIdentity
from captioner.artifacts.tables import CAPTION_ROWS, FINAL
from captioner.config import ImageLimits, SourceConfig, Split
from captioner.errors import SourceError, StoreError
from captioner.sources.captions import (
    CaptionFile,
    looks_like_captions,
    merge_captions,
    parse_captions,
)
from captioner.sources.place import Place
from captioner.sources.splits import hashed_split, split_of_list
from captioner.sources.tasks import (
    BYTES_PER_PIECE,
    Piece,
    PieceSource,
    kind_of,
    one_line,
    source_rows,
)

logger = logging.getLogger(__name__)

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
MOST_ROWS_PER_PIECE = 64
LEAST_ROWS_PER_PIECE = 8
_CAPTIONS_PER_BATCH = 10_000
# Flickr8k.token.txt has five captions of 2258277193_586949ec62.jpg.1, which is not among its images.
_NO_IMAGE = re.compile(r".+\.jpe?g\.\d+", re.I)


def open_place(place: Place) -> "FolderSource | None":
    """A directory with images, or one file."""
    if place.files is not None and not any(is_image(file.path) for file in place.files):
        return None
    return FolderSource(
        place.uri,
        place.files,
        place.options,
        place.limits,
        captions=place.captions,
        left_out=place.others(is_image),
    )


class FolderSource:
    """Image files below a folder, or one image; an image's id is its path relative to the folder.

    Splits come from the captions file or from Flickr8k's lists (``Flickr_8k.trainImages.txt`` ...) beside it. An image
    that these leave out gets the configured split, and by default trains: it must not join a published test split.
    Where there is neither, captioned images are split 80/10/10 by a hash of the id, others are all ``test``.
    """

    def __init__(
        self,
        uri: str,
        files: list[storage.FileInfo] | None,
        options: SourceConfig,
        limits: ImageLimits,
        *,
        captions: bool = True,
        left_out: dict[str, int] | None = None,
    ):
        """
        Args:
            files: what is below the folder, captions files included; None when ``uri`` is itself an image file.
            captions: False takes the images alone.
            left_out: files that are no images, by kind; those with captions among them.

        Raises:
            SourceError: the captions cannot be read, or name an image that is not there.
        """
        self.uri = uri
        self.options = options
        self.limits = limits
        self._single = files is None
        others = files if files is not None and captions else []
        asked = options.captions if captions else None
        images = (
            [_single(uri)] if files is None else [file for file in files if is_image(file.path)]
        )
        self._captions, splits = _match(_find_captions(others, asked), images)
        splits = _listed_splits(others, images) | splits
        self._rows = self._choose(images, splits)
        self._left_out = dict(left_out or {})
        if over := len(images) - len(self._rows):
            self._left_out["over the limit"] = over

    def identity(self) -> SourceIdentity:
        listing = "".join(f"{file.path}:{file.size}:{split};" for file, split in self._rows)
        captions = json.dumps(self._captions, sort_keys=True) if self._captions else ""
        return SourceIdentity(
            kind="folder",
            uri=self.uri,
            options={
                "files": hashlib.sha256(listing.encode()).hexdigest(),
                "captions": hashlib.sha256(captions.encode()).hexdigest() if captions else None,
                "limit": self.options.limit,
            },
        )

    def num_images(self) -> int:
        return len(self._rows)

    def left_out(self) -> dict[str, int]:
        return dict(self._left_out)

    def images(self) -> PieceSource:
        # Two tasks for each CPU at least, so that a small folder too is read and loaded by all of them.
        cpus = int(ray.cluster_resources().get("CPU", 1)) if ray.is_initialized() else 1
        most = math.ceil(len(self._rows) / (2 * cpus))
        most = min(max(most, LEAST_ROWS_PER_PIECE), MOST_ROWS_PER_PIECE)
        # Opened once and sent along: opening S3 may ask it for the bucket's region, and workers may lack its endpoint.
        filesystem, root = storage.resolve(self.uri)
        root = posixpath.dirname(root) if self._single else root
        pieces: list[Piece] = []
        chosen: list[storage.FileInfo] = []
        size = 0
        for number, (file, _) in enumerate(self._rows, 1):
            chosen.append(file)
            size += min(file.size, self.limits.max_bytes)
            if len(chosen) == most or size >= BYTES_PER_PIECE // 2 or number == len(self._rows):
                read = partial(_read, chosen, filesystem, root, self.limits.max_bytes)
                pieces.append(Piece(read, len(chosen), size))
                chosen, size = [], 0
        return PieceSource("Folder", pieces)

    def captions(self) -> Iterator[pa.RecordBatch]:
        rows = []
        for file, split in self._rows:
            texts: list[str | None] = [*self._captions.get(file.path, [])] or [None]
            for index, caption in enumerate(texts):
                row = {"image_id": file.path, "split": split, "caption": caption}
                rows.append({**row, "index": None if caption is None else index})
            if len(rows) >= _CAPTIONS_PER_BATCH:
                yield pa.RecordBatch.from_pylist(rows, CAPTION_ROWS)
                rows = []
        if rows:
            yield pa.RecordBatch.from_pylist(rows, CAPTION_ROWS)

    def _choose(
        self, images: list[storage.FileInfo], splits: dict[str, Split]
    ) -> list[tuple[storage.FileInfo, Split]]:
        """The images taken, each with its split."""
        taken: dict[Split, int] = {}
        rows = []
        for file in images:
            split = splits.get(file.path) or self._default_split(file.path, bool(splits))
            taken[split] = taken.get(split, 0) + 1
            if self.options.limit is None or taken[split] <= self.options.limit:
                rows.append((file, split))
        return rows

    def _default_split(self, path: str, others_have_one: bool) -> Split:
        if self.options.split != "auto":
            return self.options.split
        if others_have_one:
            return "train"
        return hashed_split(path) if self._captions else "test"


def is_image(path: str) -> bool:
    return path.lower().endswith(SUFFIXES)


def _single(uri: str) -> storage.FileInfo:
    filesystem, path = storage.resolve(uri)
    info = filesystem.get_file_info(path)
    return storage.FileInfo(uri, posixpath.basename(path), info.size, info.mtime_ns)


def _find_captions(files: list[storage.FileInfo], asked: str | None) -> CaptionFile:
    found = [asked] if asked else [file.uri for file in files if looks_like_captions(file.path)]
    parsed = {}
    for name in found:
        try:
            parsed[name] = parse_captions(name, storage.read_bytes(name))
        except StoreError as error:
            raise SourceError(f"captions file {name}: {error}") from error
    if len(parsed) > 1:
        return merge_captions(parsed)
    return next(iter(parsed.values()), CaptionFile({}, {}))


def _match(
    found: CaptionFile, images: list[storage.FileInfo]
) -> tuple[dict[str, list[str]], dict[str, Split]]:
    """Captions and splits by the images' own paths.

    A captions file may name an image by its path, its base name, or its base name without the suffix.
    """
    paths = {file.path for file in images}
    short: dict[str, set[str]] = {}
    for path in paths:
        base = posixpath.basename(path)
        short.setdefault(base, set()).add(path)
        short.setdefault(posixpath.splitext(base)[0], set()).add(path)
    captions: dict[str, list[str]] = {}
    splits: dict[str, Split] = {}
    for name, texts in found.captions.items():
        candidates = {name} if name in paths else short.get(posixpath.basename(name), set())
        if not candidates and not texts:  # merely listed
            continue
        if not candidates and _NO_IMAGE.fullmatch(name):
            logger.warning(
                "%d captions of %s are left out: not the name of an image", len(texts), name
            )
            continue
        if len(candidates) != 1:
            why = "which two images could be" if candidates else "which is not there"
            raise SourceError(f"captions for image {name}, {why}")
        (path,) = candidates
        if path in captions:
            raise SourceError(f"captions for image {path} are given twice, once as {name}")
        captions[path] = [text for text in texts if text]
        if name in found.splits:
            splits[path] = found.splits[name]
    return captions, splits


def _listed_splits(
    files: list[storage.FileInfo], images: list[storage.FileInfo]
) -> dict[str, Split]:
    """Splits by Flickr8k's lists of base names."""
    listed: dict[str, Split] = {}
    for file in files:
        if split := split_of_list(file.path):
            for name in storage.read_bytes(file.uri).decode("utf-8", "replace").split():
                if listed.setdefault(name, split) != split:
                    raise SourceError(f"{file.uri}: {name} is in the {listed[name]} list too")
    names = {file.path: posixpath.basename(file.path) for file in images}
    return {path: listed[name] for path, name in names.items() if name in listed}


def _read(
    files: list[storage.FileInfo], filesystem: FileSystem, root: str, max_bytes: int
) -> Iterator[pa.Table]:
    data: list[bytes | None] = []
    errors: list[str | None] = []
    kinds: list[str | None] = []
    for file in files:
        content, error, kind = None, None, None
        if file.size > max_bytes:
            error, kind = f"{file.size} bytes, over the limit of {max_bytes}", FINAL
        else:
            try:
                with filesystem.open_input_file(f"{root}/{file.path}") as handle:
                    content = handle.read()
            except OSError as problem:
                error, kind = f"cannot be read: {one_line(problem)}", kind_of(problem)
        data.append(content)
        errors.append(error)
        kinds.append(kind)
    yield source_rows(
        [file.path for file in files],
        [file.uri for file in files],
        data,
        errors,
        kinds,
        sizes=[file.size for file in files],
        mtime=[file.mtime for file in files],
    )
