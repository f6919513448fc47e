"""What may be done next with what a job has published, as a command to copy."""

import contextlib
import os
import shlex
import shutil
import sys
from pathlib import Path

from captioner import storage
from captioner.artifacts.manifests import (
    CaptionsManifest,
    LikenessManifest,
    Manifest,
    ModelManifest,
    ReportManifest,
    SearchManifest,
    StoreManifest,
)
from captioner.errors import CaptionerError


def command(*words: str) -> str:
    """``captioner`` with ``words``, as a shell here takes it."""
    return shlex.join([_program(), *words])


def serve(model: str, prompt: str | None = None) -> str:
    """The command that serves a model; a chat model is asked something."""
    return command("serve", "--model", model, *(["--prompt", prompt] if prompt else []))


def after(uri: str, manifest: Manifest) -> str | None:
    """What may be done with a published directory, by its kind."""
    match manifest:
        case StoreManifest():
            captioned = {split for split, counts in manifest.splits.items() if counts.captions}
            if captioned >= {"train", "validation"}:
                return command("train", "--features", uri, "--output", free_place(uri, "model"))
            return command("verify", uri)
        case ModelManifest():
            return serve(uri)
        case SearchManifest():
            return serve(storage.join(uri, "model"))
        case ReportManifest() | CaptionsManifest():
            return serve(manifest.model)
        case LikenessManifest() if pictures := [
            file.path for file in manifest.files if file.path.endswith(".png")
        ]:
            return f"look at {shlex.quote(storage.join(uri, pictures[0]))}"
    return None


def free_place(uri: str, name: str) -> str:
    """A directory that is not there yet, beside ``uri``."""
    folder, slash, _ = uri.rstrip("/").rpartition("/")
    first = f"{folder}{slash}{name}"
    taken = 1
    # A store that does not say is no reason for a job to fail that has published.
    with contextlib.suppress(CaptionerError):
        while storage.exists(first if taken == 1 else f"{first}-{taken}"):
            taken += 1
    return first if taken == 1 else f"{first}-{taken}"


def _program() -> str:
    """The console script, by its name where a shell finds it."""
    script = Path(sys.executable).with_name("captioner")
    if shutil.which("captioner") or not script.exists():
        return "captioner"
    path = os.path.relpath(script)
    return str(script) if path.startswith("..") else path
