"""Models of the Hugging Face hub: ``hf:org/name[@revision]``, in the hub's cache on this machine."""

import json
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
from captioner.errors import ModelError, OutOfReachError

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
    name, _, revision = uri.removeprefix(PREFIX).partition("@")
    try:
        manifest = Path(hf_hub_download(name, MANIFEST, revision=revision or None))
        commit = manifest.parent.name
        raw = json.loads(manifest.read_bytes())
        listed = parse_record(f"{uri}: {MANIFEST}", raw, ModelManifest, ModelError).files
        folder = snapshot_download(
            name, revision=commit, allow_patterns=[MANIFEST, *(entry.path for entry in listed)]
        )
    except LocalEntryNotFoundError as error:
        raise OutOfReachError(
            f"{uri}: the hub cannot be reached, and its cache has no such model"
        ) from error
    except EntryNotFoundError as error:
        raise ModelError(f"{uri} is no model of this package: it has no {MANIFEST}") from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise ModelError(
            f"{uri}: there is no such repository or revision, or this token may not see it"
        ) from error
    except (HFValidationError, json.JSONDecodeError) as error:
        raise ModelError(f"{uri}: {' '.join(str(error).split())}") from error
    except (HfHubHTTPError, HTTPError, OSError) as error:
        raise OutOfReachError(f"{uri}: {' '.join(str(error).split())}") from error
    return f"{PREFIX}{name}@{commit}", folder
