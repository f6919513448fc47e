"""Models of the Hugging Face hub: ``hf:org/name[@revision]``, in the hub's cache on this machine."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from captioner.artifacts.manifests import MANIFEST, ModelManifest, parse_record
from captioner.errors import ModelError, OutOfReachError, one_line

PREFIX = "hf:"


def fetch(uri: str) -> tuple[str, str]:
    """Fetch what the manifest of a model on the hub lists, and nothing else; what is in the cache is not fetched again.

    Args:
        uri: ``hf:org/name`` (its main branch) or ``hf:org/name@revision``.

    Returns:
        the model's URI with the revision as a commit, so that every machine gets the same; its folder here.

    Raises:
        ModelError: there is no such model, or it is not one of this package.
        OutOfReachError: the hub is out of reach, and the cache has no such model.
    """
    found, manifest = _file(uri, MANIFEST)
    if manifest is None:
        raise ModelError(f"{uri} is no model of this package: it has no {MANIFEST}")
    try:
        raw = json.loads(manifest.read_bytes())
    except json.JSONDecodeError as error:
        raise ModelError(f"{uri}: {one_line(error)}") from error
    listed = parse_record(f"{uri}: {MANIFEST}", raw, ModelManifest, ModelError).files
    return found, snapshot(found, [MANIFEST, *(entry.path for entry in listed)])


def find_foreign(uri: str) -> str | None:
    """The URI, with the revision as a commit, of a model that is not of this package but has a ``config.json``; None of
    any other.

    Raises:
        ModelError, OutOfReachError: as ``fetch``.
    """
    if _file(uri, MANIFEST, missing=True)[1] is not None:
        return None
    found, config = _file(uri, "config.json")
    return None if config is None else found


def snapshot(uri: str, patterns: list[str]) -> str:
    """Fetch the files of a commit that match, those in folders excepted that no pattern names.

    Returns:
        the folder that they are in.

    Raises:
        ModelError, OutOfReachError: as ``fetch``.
    """
    name, _, commit = uri.removeprefix(PREFIX).partition("@")
    with _told(uri):
        return snapshot_download(
            name,
            revision=commit,
            allow_patterns=patterns,
            ignore_patterns=None if any("/" in one for one in patterns) else "*/*",
        )


def _file(uri: str, path: str, missing: bool = False) -> tuple[str, Path | None]:
    """A file, and the URI with its commit; None where the repository has none.

    Args:
        missing: out of reach counts as missing.
    """
    name, _, revision = uri.removeprefix(PREFIX).partition("@")
    with _told(uri):
        try:
            place = Path(hf_hub_download(name, path, revision=revision or None))
        except EntryNotFoundError as error:
            if isinstance(error, LocalEntryNotFoundError) and not missing:
                raise
            return uri, None
    return f"{PREFIX}{name}@{place.parent.name}", place


@contextmanager
def _told(uri: str) -> Iterator[None]:
    try:
        yield
    except LocalEntryNotFoundError as error:
        raise OutOfReachError(
            f"{uri}: the hub cannot be reached, and its cache has no such model"
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise ModelError(
            f"{uri}: there is no such repository or revision, or this token may not see it"
        ) from error
    except HFValidationError as error:
        raise ModelError(f"{uri}: {one_line(error)}") from error
    except (HfHubHTTPError, HTTPError, OSError) as error:
        raise OutOfReachError(f"{uri}: {one_line(error)}") from error
