"""Tables of captions written without a model, for tests of what is made of them."""

from captioner.artifacts.collection import Tables
from captioner.artifacts.manifests import CaptionsManifest, Counts, FileEntry, SourceIdentity
from captioner.artifacts.output import Output
from captioner.config import DecodeConfig


def tables_of(
    output: Output, files: list[FileEntry], source: SourceIdentity | None = None
) -> Tables:
    """What lies in ``output`` as a collection's captions."""
    manifest = CaptionsManifest(
        model="",
        version="",
        decode=DecodeConfig(),
        source=source or SourceIdentity(kind="folder", uri="photos"),
        counts=Counts(ok=sum(entry.rows or 0 for entry in files), rejected=0, unreadable=0),
        files=files,
    )
    return Tables(output.root, manifest, "captions")
