"""What is written last into every published directory, and the one way to open it."""

import re
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from captioner import storage
from captioner.config import DecodeConfig
from captioner.encoders.spec import EncoderSpec
from captioner.errors import StoreError

MANIFEST = "manifest.json"
SCHEMA_VERSION = 2
_COMMIT = re.compile(r"@[0-9a-f]{40}$")


class Record(BaseModel):
    """Base of everything written to a manifest: immutable, and strict about what it reads."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class FileEntry(Record):
    """One file of a published directory."""

    path: str
    """Relative to the manifest; a URI where the file belongs to an older part of a growing collection."""
    bytes: int
    rows: int | None = None
    """Of a table."""
    sha256: str | None = None
    """Of files that are read whole; Parquet pages carry checksums of their own."""
    part: str | None = None
    """Key of the source that its rows are of, in a collection that has grown."""

    def uri(self, root: str) -> str:
        """Where it lies, given the directory of the manifest."""
        elsewhere = "://" in self.path or self.path.startswith("/")
        return self.path if elsewhere else storage.join(root, self.path)


class Manifest(Record):
    """``manifest.json``: its presence is what makes a directory published."""

    kind: str
    schema_version: int = SCHEMA_VERSION
    files: list[FileEntry]

    def tables(self, directory: str) -> list[FileEntry]:
        """Those with rows in a subdirectory, its own or of an older part."""
        return [
            entry
            for entry in self.files
            if entry.rows and entry.path.split("/")[-2:-1] == [directory]
        ]


class SourceIdentity(Record):
    """Where the images came from."""

    kind: str
    uri: str
    options: dict[str, str | int | None] = {}
    """What chooses among the images there. With kind and URI it decides whether a run may continue another's directory:
    it then goes on with the listing that the other began with, and with today's captions."""
    listing: str | None = None
    """Digest of which images there were."""
    captions: str | None = None
    """Digest of their captions and splits."""

    @property
    def key(self) -> str:
        """What part of a collection its images are: the same source's, whatever is chosen or changed in it, a later
        commit of the hub's included."""
        place = _COMMIT.sub("", self.uri)
        return " ".join([self.kind, place, str(self.options.get("id_prefix") or "")])

    def claim(self) -> dict[str, Any]:
        """What must be the same for a run to continue another."""
        return self.model_dump(mode="json", include={"kind", "uri", "options"})


class Counts(Record):
    """What became of every file found."""

    ok: int
    rejected: int
    """Not pictures we accept: final."""
    unreadable: int
    """Could not be read: worth another try."""
    left_out: dict[str, int] = {}
    """Not taken, by kind."""

    @property
    def images(self) -> int:
        """Pictures taken from the source."""
        return self.ok + self.rejected + self.unreadable

    @property
    def found(self) -> int:
        """Files found."""
        return self.images + sum(self.left_out.values())


class Part(Record):
    """A source of a collection that has grown."""

    source: SourceIdentity
    left_out: dict[str, int] = {}
    """Of its files, not taken, by kind."""


class Collection(Manifest):
    """Of rows about pictures, which may have grown from older parts."""

    source: SourceIdentity
    """The newest part's."""
    counts: Counts
    parts: dict[str, Part] = {}
    """All sources, by key; empty where nothing was extended."""
    removed: FileEntry | None = None
    """Table (file, image_id) of rows that no longer count."""


class SplitCounts(Record):
    """Good pictures of a split, and their captions."""

    images: int
    captions: int


class EncoderRecord(Record):
    """The encoder of a store or a model."""

    spec: EncoderSpec
    weights: str
    """Where its weights came from: a published name, ``random(seed=0)``, or a file's base name."""
    runtime: str = "eager"
    """How it was run: changes speed, not features."""


class StoreManifest(Collection):
    """Of a feature store."""

    kind: Literal["features"] = "features"
    encoder: EncoderRecord
    grid: bool
    """Whether the grid is there beside the pooled vector."""
    mirrored: bool = False
    """Whether the features of mirrored images are there, too."""
    crops: int = 0
    """Random crops of every image whose features are there, too."""
    thumbnails: bool = True
    splits: dict[str, SplitCounts]


class ModelManifest(Manifest):
    """Of a model directory."""

    kind: Literal["model"] = "model"


class CaptionsManifest(Collection):
    """Of a captioned collection."""

    kind: Literal["captions"] = "captions"
    model: str
    """URI of the model directory."""
    version: str
    """SHA-256 of the model's weights or, of a model of transformers, of its files."""
    decode: DecodeConfig
    sentences: bool = False
    """Whether captions have a capital and a full stop."""


class ReportManifest(Manifest):
    """Of an evaluation report."""

    kind: Literal["report"] = "report"
    model: str
    features: str | None
    """URI of the store; None of a report on a source's pictures."""
    source: str | None = None
    """As it was named, of a report on its pictures."""
    split: str
    images: int


class SearchManifest(Manifest):
    """Of a search."""

    kind: Literal["search"] = "search"
    best: int
    """Number of the trial whose model is in ``model/``."""
    metric: str
    trials: int


class LikenessManifest(Manifest):
    """Of the images most like one."""

    kind: Literal["likeness"] = "likeness"
    features: str
    """URI of the store that was searched."""
    image: str
    images: int
    """Found."""


# By kind: what it is called, and how it is made again.
NOUNS = {
    "features": ("feature store", "extract"),
    "model": ("model directory", "train"),
    "captions": ("captioned collection", "caption"),
    "report": ("report", "evaluate"),
    "search": ("search", "tune"),
    "likeness": ("list of like images", "search"),
}
KINDS: dict[str, type[Manifest]] = {
    "features": StoreManifest,
    "model": ModelManifest,
    "captions": CaptionsManifest,
    "report": ReportManifest,
    "search": SearchManifest,
    "likeness": LikenessManifest,
}
AnyManifest = TypeVar("AnyManifest", bound=Manifest)


def open_manifest(
    uri: str, wanted: type[AnyManifest], error: type[Exception] = StoreError
) -> AnyManifest:
    """The manifest of a published directory.

    Args:
        wanted: the kind that is expected; ``Manifest`` takes any.
        error: what is raised.

    Raises:
        error: nothing is published there, it is of another kind, of another release, or damaged.
    """
    uri = storage.absolute(uri)
    place = storage.join(uri, MANIFEST)
    kind = None if wanted is Manifest else str(wanted.model_fields["kind"].default)
    noun = "published directory" if kind is None else NOUNS[kind][0]
    try:
        if not storage.exists(place):
            raise error(f"{uri} is not a {noun}: it has no {MANIFEST}")
        raw = storage.read_json(place)
    except StoreError as problem:
        raise error(str(problem)) from problem
    found = raw.get("kind") if isinstance(raw, dict) else None
    if not isinstance(found, str) or found not in KINDS or kind not in (None, found):
        raise error(f"{uri} is not a {noun}: its manifest says {found!r}")
    if raw.get("schema_version") != SCHEMA_VERSION:
        older = "an older" if str(raw.get("schema_version")) < str(SCHEMA_VERSION) else "a newer"
        raise error(f"{uri} was written by {older} release: {NOUNS[found][1]} again")
    return parse_record(place, raw, KINDS[found] if kind is None else wanted, error)  # type: ignore[return-value]


AnyRecord = TypeVar("AnyRecord", bound=Record)


def parse_record(
    place: str, raw: Any, wanted: type[AnyRecord], error: type[Exception]
) -> AnyRecord:
    """JSON read from ``place`` as a record.

    Raises:
        error: it does not fit.
    """
    try:
        return wanted.model_validate(raw)
    except ValidationError as problem:
        first = problem.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise error(f"{place} is damaged: {where}: {first['msg']}") from problem
