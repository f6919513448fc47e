"""A folder of images, or one image, with a captions file or without."""

import hashlib
import posixpath
from collections.abc import Iterator
from functools import partial

import pyarrow as pa

from captioner import storage
from captioner.config import ImageLimits, SourceConfig
from captioner.errors import SourceError, StoreError
from captioner.schema import CAPTION_ROWS, SourceIdentity
from captioner.sources.captions import (
    FLICKR_SPLIT_LISTS,
    CaptionFile,
    looks_like_captions,
    parse_captions,
)
from captioner.sources.tasks import Piece, PieceSource, source_rows

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
ROWS_PER_PIECE = 64
BYTES_PER_PIECE = 32 * 2**20
_CAPTIONS_PER_BATCH = 10_000


class FolderSource:
    """Image files below a folder; an image's id is its path relative to the folder.

    Splits come from the captions file, from Flickr's lists (``Flickr_8k.trainImages.txt`` ...) beside it, from the
    configuration, or, with captions but no lists, 80/10/10 from a hash of the id.
    """

    def __init__(
        self, uri: str, files: list[storage.FileInfo], options: SourceConfig, limits: ImageLimits
    ):
        """
        Args:
            files: the listing of the folder; empty when ``uri`` is itself an image file.
        """
        self.uri = uri
        self.options = options
        self.limits = limits
        if files:
            images = [file for file in files if file.path.lower().endswith(SUFFIXES)]
        else:
            images = [] if storage.is_directory(uri) else [_single(uri)]
        if not images:
            raise SourceError(f"{uri}: no images ({' '.join(SUFFIXES)}) and no Parquet files")
        found = self._find_captions(files)
        self._captions, splits = _match(found, images, found_in=self._captions_uri or "")
        lists = _split_lists(files)
        self._rows = self._choose(images, splits, lists)

    def identity(self) -> SourceIdentity:
        listing = "".join(f"{file.path}:{file.size};" for file, _ in self._rows)
        captions = "".join(f"{name}:{texts};" for name, texts in sorted(self._captions.items()))
        return SourceIdentity(
            kind="folder",
            uri=self.uri,
            options={
                "files": hashlib.sha256(listing.encode()).hexdigest(),
                "captions": hashlib.sha256(captions.encode()).hexdigest() if captions else None,
                "split": self.options.split,
                "limit": self.options.limit,
            },
        )

    def num_images(self) -> int:
        return len(self._rows)

    def images(self) -> PieceSource:
        pieces: list[Piece] = []
        start = 0
        while start < len(self._rows):
            end, size = start, 0
            while end < len(self._rows) and end - start < ROWS_PER_PIECE and size < BYTES_PER_PIECE:
                size += self._rows[end][0].size
                end += 1
            chosen = self._rows[start:end]
            pieces.append(Piece(partial(_read, chosen, self.limits.max_bytes), len(chosen), size))
            start = end
        return PieceSource("Folder", pieces)

    def captions(self) -> Iterator[pa.RecordBatch]:
        rows = []
        for file, _ in self._rows:
            for index, caption in enumerate(self._captions.get(file.path, [])):
                rows.append({"image_id": file.path, "caption": caption, "index": index})
            if len(rows) >= _CAPTIONS_PER_BATCH:
                yield pa.RecordBatch.from_pylist(rows, CAPTION_ROWS)
                rows = []
        if rows:
            yield pa.RecordBatch.from_pylist(rows, CAPTION_ROWS)

    def _find_captions(self, files: list[storage.FileInfo]) -> CaptionFile:
        self._captions_uri = self.options.captions
        if self._captions_uri is None:
            candidates = [file for file in files if looks_like_captions(file.path)]
            if len(candidates) > 1:
                names = ", ".join(file.path for file in candidates)
                raise SourceError(f"{self.uri}: several captions files ({names}): choose one with source-options.captions")
            if not candidates:
                return CaptionFile({}, {})
            self._captions_uri = candidates[0].uri
        elif not storage.exists(self._captions_uri):
            raise SourceError(f"source-options.captions: {self._captions_uri} is not there")
        return parse_captions(self._captions_uri, storage.read_bytes(self._captions_uri))

    def _choose(
        self, images: list[storage.FileInfo], splits: dict[str, str], lists: dict[str, str]
    ) -> list[tuple[storage.FileInfo, str]]:
        taken: dict[str, int] = {}
        rows = []
        for file in images:
            split = self._split(file.path, splits, lists)
            taken[split] = taken.get(split, 0) + 1
            if self.options.limit is None or taken[split] <= self.options.limit:
                rows.append((file, split))
        return rows

    def _split(self, path: str, splits: dict[str, str], lists: dict[str, str]) -> str:
        if self.options.split != "auto":
            return self.options.split
        known = splits.get(path) or lists.get(posixpath.basename(path))
        if known:
            return known
        if not self._captions:
            return "test"
        bucket = int.from_bytes(hashlib.sha256(path.encode()).digest()[:4]) % 10
        return {8: "validation", 9: "test"}.get(bucket, "train")


def _single(uri: str) -> storage.FileInfo:
    filesystem, path = storage.resolve(uri)
    return storage.FileInfo(uri, posixpath.basename(path), filesystem.get_file_info(path).size)


def _match(
    found: CaptionFile, images: list[storage.FileInfo], found_in: str
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Captions and splits by the images' own paths; a captions file may name only the base name."""
    by_path = {file.path: file.path for file in images}
    by_name: dict[str, str | None] = {}
    for file in images:
        name = posixpath.basename(file.path)
        by_name[name] = None if name in by_name else file.path
    captions: dict[str, list[str]] = {}
    splits: dict[str, str] = {}
    for name, texts in found.captions.items():
        base = posixpath.basename(name)
        path = by_path.get(name) or by_name.get(base)
        if path is None:
            why = "which two images have" if base in by_name else "which is not there"
            raise SourceError(f"{found_in}: a caption for image {name}, {why}")
        if path in captions:
            raise SourceError(f"{found_in}: captions for image {path} are given twice")
        captions[path] = [text for text in texts if text]
        if name in found.splits:
            splits[path] = found.splits[name]
    return captions, splits


def _split_lists(files: list[storage.FileInfo]) -> dict[str, str]:
    splits: dict[str, str] = {}
    for file in files:
        for suffix, split in FLICKR_SPLIT_LISTS.items():
            if file.path.endswith(suffix):
                names = storage.read_bytes(file.uri).decode().split()
                splits |= dict.fromkeys(names, split)
    return splits


def _read(rows: list[tuple[storage.FileInfo, str]], max_bytes: int) -> Iterator[pa.Table]:
    data: list[bytes | None] = []
    errors: list[str | None] = []
    for file, _ in rows:
        content, error = None, None
        if file.size > max_bytes:
            error = f"{file.size} bytes, the limit is {max_bytes}"
        else:
            try:
                content = storage.read_bytes(file.uri)
            except (StoreError, OSError) as problem:
                error = " ".join(str(problem).split())
        data.append(content)
        errors.append(error)
    yield source_rows(
        [file.path for file, _ in rows],
        [split for _, split in rows],
        [file.uri for file, _ in rows],
        data,
        errors,
    )
