"""A folder of images, or one image, with a captions file or without."""

import hashlib
import json
import math
import posixpath
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cached_property, partial
from itertools import groupby, islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from pyarrow.fs import FileSystem

from captioner import storage
from captioner.artifacts.id_set import NONE, IdSet
from captioner.artifacts.manifests import SourceIdentity
from captioner.artifacts.tables import CAPTION_ROWS, SPLITS
from captioner.config import Split
from captioner.errors import SourceError
from captioner.sources.base import Listed
from captioner.sources.columns import column_flags
from captioner.sources.folder_files import MOST_ROWS, cut, read
from captioner.sources.image_files import is_image, is_known, kind_of_file, sniff
from captioner.sources.nearby import Nearby, find_captions
from captioner.sources.outage import RETRY_SECONDS
from captioner.sources.place import Place
from captioner.sources.splits import hashed_split, split_of_folder, split_of_list, splits_called
from captioner.sources.tasks import BYTES_PER_PIECE, Piece, PieceSource, states

LEAST_ROWS_PER_PIECE = 8
_MOST_PIECES = 2**14
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
        image = storage.FileTable.collect(posixpath.dirname(place.uri), [_single(place.uri)])
        return FolderSource(place.uri, image, {}, place, single=True)
    sniffed: set[str] = set()
    if place.options.sniff:
        unknown = [file for file in place.files if not is_known(file.path)]
        sniffed.update(file.path for file in sniff(unknown))
    # The images are then no longer among the place's files, or those of a large folder would be held twice.
    today = place.files.take(lambda file: is_image(file.path) or file.path in sniffed)
    images = place.or_begun("folder", today)
    return FolderSource(place.uri, images, place.left_out, place, today=today) if images else None


Codes = np.ndarray[Any, np.dtype[np.int8]]


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
        images: storage.FileTable,
        left_out: Mapping[str, int],
        place: Place,
        *,
        today: storage.FileTable | None = None,
        listed: bool = False,
        single: bool = False,
    ):
        """
        Args:
            images: their paths are relative to ``uri``.
            left_out: what the listing passed over, by kind.
            today: what would be the images of a run that begins today.
            listed: ``uri`` is a list of images, wherever they are.
            single: ``uri`` is itself the image.

        Raises:
            SourceError: the captions cannot be read, or name an image that is not there.
        """
        self.uri = uri
        self.options = place.options
        self.limits = place.limits
        self._single, self._listed = single, listed
        others = list(place.files or ())
        found = Nearby()
        asked = place.options.captions is not None or column_flags(place.options)
        if (place.captions and (others or asked)) or place.options.id_column is not None:
            # Captions of pictures that came after the run began are no mistake.
            paths = {file.path for table in (images, today or ()) for file in table}
            found = find_captions(uri, others, sorted(paths), place.options)
        self._captions = found.captions if place.captions else {}
        begun = place.beginning
        self._files = images
        self._ids = self._own_ids(found) if begun is None else begun.ids
        self._splits = self._split(*((found, others) if place.captions else (Nearby(), [])))
        if begun is not None:  # it has chosen, and counted
            self._left_out = begun.left_out
            return
        kinds = Counter(left_out)
        read = set(found.files)
        kinds.update(
            "captions file" if file.uri in read else kind_of_file(file.path) for file in others
        )
        kinds["missing picture"] = found.missing
        kinds["over the limit"] = self._limit()
        self._left_out = {kind: count for kind, count in kinds.most_common() if count}

    def identity(self) -> SourceIdentity:
        return self._identity

    @cached_property
    def _identity(self) -> SourceIdentity:
        listing, captions = hashlib.sha256(), hashlib.sha256()
        for image_id, file, split in self._rows():
            state = [image_id, file.path, file.size, file.mtime]
            listing.update(json.dumps(state).encode())
            captions.update(json.dumps([split, self._captions.get(file.path)]).encode())
        return SourceIdentity(
            kind="folder",
            uri=self.uri,
            options={"limit": self.options.limit, "id_column": self.options.id_column},
            listing=listing.hexdigest(),
            captions=captions.hexdigest(),
        )

    def files(self) -> Iterator[Listed]:
        for image_id, file, _ in () if self._single else self._rows():
            yield image_id, file

    def states(self) -> Iterator[pa.RecordBatch]:
        rows = self._rows()
        while some := list(islice(rows, _CAPTIONS_PER_BATCH)):
            files = [file for _, file, _ in some]
            ids = [image_id for image_id, _, _ in some]
            yield states(ids, [file.size for file in files], [file.mtime for file in files])

    def num_images(self) -> int:
        return len(self._files)

    def left_out(self) -> dict[str, int]:
        return dict(self._left_out)

    def images(self, done: IdSet = NONE, /, *, retry_seconds: float = RETRY_SECONDS) -> PieceSource:
        # Two tasks for each CPU at least, so that a small folder too is read and loaded by all of them.
        cpus = int(ray.cluster_resources().get("CPU", 1)) if ray.is_initialized() else 1
        left = max(len(self._files) - len(done), 1)
        most = min(max(math.ceil(left / (2 * cpus)), LEAST_ROWS_PER_PIECE), MOST_ROWS)
        # What Ray Data keeps of a task would be more than what is known of its images.
        most = max(most, left // _MOST_PIECES)
        pieces: list[Piece] = []
        for table in self._batches():
            wanted = ~done.holds(table["image_id"].to_pylist())
            if not wanted.any():
                continue
            table = table if wanted.all() else table.filter(pa.array(wanted))
            # One copy on every node that needs it, instead of one in the driver and one in each task.
            held = ray.put(table) if ray.is_initialized() else table
            sizes = np.minimum(table["size"].to_numpy(), self.limits.max_bytes)
            largest = math.inf if most > MOST_ROWS else BYTES_PER_PIECE / 2
            for filesystem, paths, rows in self._places(table):
                for start, stop in cut(sizes[rows.start : rows.stop], most, largest):
                    run = rows[start:stop]
                    piece = partial(
                        read,
                        held,
                        run,
                        self._files.uri,
                        filesystem,
                        paths if isinstance(paths, str) else paths[start:stop],
                        max_bytes=self.limits.max_bytes,
                        retry_seconds=retry_seconds,
                    )
                    pieces.append(Piece(piece, len(run), int(sizes[run.start : run.stop].sum())))
        return PieceSource("Folder", pieces)

    def captions(self) -> Iterator[pa.RecordBatch]:
        rows = []
        for image_id, file, split in self._rows():
            texts: list[str | None] = [*self._captions.get(file.path, [])] or [None]
            for index, caption in enumerate(texts):
                head = {"image_id": image_id, "split": split, "caption": caption}
                rows.append({**head, "index": None if caption is None else index})
            if len(rows) >= _CAPTIONS_PER_BATCH:
                yield pa.RecordBatch.from_pylist(rows, CAPTION_ROWS)
                rows = []
        if rows:
            yield pa.RecordBatch.from_pylist(rows, CAPTION_ROWS)

    def _places(self, table: pa.Table) -> Iterator[tuple[FileSystem, str | list[str], range]]:
        """File systems and the rows of ``table`` that lie there: below a directory, or each at a path of its own."""
        # Opened once and sent along: opening S3 may ask it for the bucket's region, and workers may lack its endpoint.
        if not (self._single or self._listed):
            yield *storage.resolve(self.uri), range(len(table))
            return
        batches = table.select(storage.FILE_SCHEMA.names).to_batches()
        files = list(storage.FileTable(self._files.uri, batches, anywhere=self._files.anywhere))
        start = 0
        for _, group in groupby(files, lambda file: storage.resolve(file.uri)[0]):
            some = [storage.resolve(file.uri) for file in group]
            yield some[0][0], [path for _, path in some], range(start, start + len(some))
            start += len(some)

    def _batches(self) -> Iterator[pa.Table]:
        """image_id, path, size and mtime of the images, some at a time."""
        start = 0
        for batch in self._files.batches():
            ids = batch["path"] if self._ids is None else self._ids[start : start + len(batch)]
            start += len(batch)
            table = pa.table(batch)
            if self._ids is not None:
                ids = pc.coalesce(ids, table["path"])
            yield table.add_column(0, "image_id", ids)

    def _rows(self) -> Iterator[tuple[str, storage.FileInfo, Split]]:
        """Id, file and split of the images."""
        ids = (name for table in self._batches() for name in table["image_id"].to_pylist())
        splits = (SPLITS[code] for code in self._splits)
        yield from zip(ids, self._files, splits, strict=True)

    def _split(self, found: Nearby, others: list[storage.FileInfo]) -> Codes:
        """The split of each image, int8 [images], by its number in ``SPLITS``."""
        listed = _listed_splits(others)
        called = splits_called(found.splits.values(), self.uri)
        told = np.full(len(self._files), -1, np.int8)
        if listed or called or self._captions:
            for number, file in enumerate(self._files):
                split = called.get(found.splits.get(file.path, ""))
                split = split or listed.get(posixpath.basename(file.path))
                if split is None and self._captions and file.path not in found.splits:
                    split = split_of_folder(file.path)
                if split is not None:
                    told[number] = SPLITS.index(split)
        missing = np.flatnonzero(told < 0)
        if len(missing):
            others_have_one = len(missing) < len(told)
            if self.options.split == "auto" and not others_have_one and self._captions:
                ids = (name for table in self._batches() for name in table["image_id"].to_pylist())
                told[:] = [SPLITS.index(hashed_split(name)) for name in ids]
            else:
                told[missing] = SPLITS.index(self._default_split(others_have_one))
        return told

    def _own_ids(self, found: Nearby) -> pa.ChunkedArray | None:
        """The user's own id of each image; None where no column of ids was asked for."""
        if self.options.id_column is None:
            return None
        owners: dict[str, str] = {}
        for file in self._files:
            own = found.ids.get(file.path)
            if own is None:
                raise SourceError(f"source-options.id-column: image {file.path} has no id")
            if owners.setdefault(own, file.path) != file.path:
                raise SourceError(
                    f"source-options.id-column: {owners[own]} and {file.path} have the same id {own!r}"
                )
        return pa.chunked_array([pa.array(owners, pa.string())])

    def _limit(self) -> int:
        """Leave out the images of each split over the limit.

        Returns:
            how many.
        """
        if self.options.limit is None:
            return 0
        taken = np.zeros(len(self._splits), bool)
        for code in range(len(SPLITS)):
            taken[np.flatnonzero(self._splits == code)[: self.options.limit]] = True
        chosen = iter(taken.tolist())
        self._files = self._files.take(lambda _: next(chosen))
        self._splits = self._splits[taken]
        if self._ids is not None:
            self._ids = self._ids.filter(pa.array(taken))
        return int((~taken).sum())

    def _default_split(self, others_have_one: bool) -> Split:
        if self.options.split != "auto":
            return self.options.split
        return "train" if others_have_one else "test"


def _single(uri: str) -> storage.FileInfo:
    filesystem, path = storage.resolve(uri)
    with storage.reading(uri):
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
