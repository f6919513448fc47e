"""Directories that appear all at once, each written by one job.

A published directory is claimed by ``_job.json`` (what is being made), filled, and completed by ``manifest.json``,
written last. Readers open a directory only through its manifest, so they never see half of one. What a job needs only
while it runs lies in ``_work``, which goes once the manifest is there.
"""

import contextlib
import hashlib
import json
import logging
import time
from collections.abc import Callable
from typing import Any

from captioner.artifacts.lease import Lease, take
from captioner.artifacts.manifests import (
    MANIFEST,
    AnyManifest,
    FileEntry,
    Manifest,
    open_manifest,
)
from captioner.errors import OutOfReachError, StoreError
from captioner.storage.exclusive import TakenError, create_exclusively
from captioner.storage.files import (
    absolute,
    delete,
    exists,
    is_local,
    is_partial,
    join,
    list_files,
    read_bytes,
    write_bytes,
)

logger = logging.getLogger(__name__)

CLAIM, WORK, LEASE = "_job.json", "_work", "lease"
# In the claim of a directory that is being cleared.
CLEARED = "cleared"
# What jobs write at the top of their directories: all that --restart ever deletes.
CONTENTS = frozenset(
    (
        *(WORK, "features", "captions", "model", "tensorboard", "attention"),
        *("encoder.safetensors", "weights.safetensors", "last.safetensors", "ngrams.safetensors"),
        *("config.json", "vocab.json", "metrics.json", "scores.json", "README.md"),
        *("history.parquet", "predictions.parquet", "trials.parquet", "neighbours.parquet"),
        *("removed.parquet", "rejects.csv", "captions.jsonl", "captions.csv"),
        *("imagefolder", "txt", "xmp", "contact_sheet.html"),
        *("curves.png", "trials.png", "grid.png", "best_and_worst.png"),
    )
)


def differences(there: Any, asked: Any, name: str = "") -> list[str]:
    """Where two JSON values differ, as ``field: there != asked``."""
    if isinstance(there, dict) and isinstance(asked, dict):
        keys = sorted(there.keys() | asked.keys())
        inner = (
            differences(there.get(key), asked.get(key), f"{name}.{key}" if name else key)
            for key in keys
        )
        return [line for lines in inner for line in lines]
    return [] if there == asked else [f"{name}: {there!r} there, {asked!r} asked"]


class Output:
    """One job's claim on an output directory.

    ``identity`` is a JSON object that says what is being made. A directory that another identity claimed is refused,
    a complete one of the same identity is reported by ``complete``, an unfinished one is continued (``resumed``), or,
    with ``restart``, cleared, whatever its identity.

    Raises:
        StoreError: the directory belongs to something else, or cannot be written.
        OutOfReachError: another run is writing it.
    """

    def __init__(self, uri: str, identity: dict[str, Any], *, restart: bool = False):
        self.root = absolute(uri)
        self._identity: dict[str, Any] = json.loads(json.dumps(identity))
        self._lease: Lease | None = None
        self.complete, claim = self._examine(restart)
        self.resumed = False
        if self.complete:
            return
        if claim is None:
            self._claim()
        job = str(identity["job"])
        self._lease = take(self.work(LEASE), self.root, job, lambda: exists(self.uri(MANIFEST)))
        try:
            # Another run may have had the directory meanwhile.
            self.complete, there = self._examine(restart)
            if self.complete:
                self.close()
            elif there is not None and (
                CLEARED in there or (restart and (claim is not None or there != self._identity))
            ):
                self._clear(there)
            else:
                self.resumed = claim is not None
        except BaseException:
            self.close()
            raise

    def _examine(self, restart: bool) -> tuple[bool, dict[str, Any] | None]:
        """Whether the directory is complete, and what it is claimed for; None where it is nobody's."""
        complete = exists(self.uri(MANIFEST))
        if not exists(self.uri(CLAIM)):
            paths = (file.path for file in list_files(self.root))
            if any(not is_partial(path) and path != f"{WORK}/{LEASE}" for path in paths):
                raise StoreError(
                    f"{self.root} is not empty and was not made by this job: choose another"
                )
            return complete, None
        try:
            claim = json.loads(read_bytes(self.uri(CLAIM)))
        except (ValueError, RecursionError):
            claim = None
        if not isinstance(claim, dict) or "job" not in claim:
            raise StoreError(
                f"{self.uri(CLAIM)} is damaged, or another program's: choose another directory, or delete this one"
            )
        different = "; ".join(differences(claim, self._identity))
        if complete and different:
            raise StoreError(f"{self.root} was made by another run: {different}: choose another")
        if different and not restart and CLEARED not in claim:
            raise StoreError(
                f"{self.root} holds an unfinished run of other settings: {different}: give its settings to go on with "
                "it, --restart to clear it and begin anew, or choose another directory"
            )
        return complete, claim

    def _claim(self) -> None:
        with contextlib.suppress(TakenError):  # the next look says by whom
            if not create_exclusively(self.uri(CLAIM), self._claim_bytes()):
                logger.warning(
                    "%s: no hard links or conditional writes here, so if two commands publish at the same moment the "
                    "later one's manifest stands: run one at a time",
                    self.root,
                )

    def _claim_bytes(self) -> bytes:
        return json.dumps(self._identity, indent=1).encode()

    def _clear(self, claim: dict[str, Any]) -> None:
        """Delete what a job left unfinished here. What no job writes stays, and so does what is published."""
        paths = [file.path for file in list_files(self.root)]
        copies = (WORK, "model") if claim["job"] == "tune" else (WORK,)
        inner = [path for path in paths if "/" in path and path.split("/")[0] not in copies]
        for name, what in (
            (MANIFEST, "published directory"),
            (CLAIM, "directory of another run"),
        ):
            for path in inner:
                if path.endswith(f"/{name}"):
                    folder = path.removesuffix(f"/{name}")
                    raise StoreError(
                        f"{self.root} holds a {what}, {folder}, and is not cleared: choose another"
                    )
        # Whoever is killed from here on leaves a directory that is nobody's, and that the next run clears.
        write_bytes(self.uri(CLAIM), json.dumps({"job": claim["job"], CLEARED: True}).encode())
        names = (
            "/".join(path.split("/")[: 2 if path.startswith(f"{WORK}/") else 1]) for path in paths
        )
        for name in sorted(set(names)):
            if is_partial(name) or (name.split("/")[0] in CONTENTS and name != f"{WORK}/{LEASE}"):
                delete(self.uri(name))
        write_bytes(self.uri(CLAIM), self._claim_bytes())

    def __enter__(self) -> "Output":
        return self

    def __exit__(self, *_: object) -> None:
        # A failed job must let go of its directory even where its process, a notebook, lives on.
        self.close()

    def uri(self, *parts: str) -> str:
        """URI of something inside the directory."""
        return join(self.root, *parts)

    def work(self, *parts: str) -> str:
        """URI of something that is needed only until the directory is published."""
        return self.uri(WORK, *parts)

    def write(self, path: str, data: bytes) -> FileEntry:
        """Write a whole file, and say what the manifest lists of it.

        Raises:
            OutOfReachError: another run has taken the directory over.
        """
        self.check()
        write_bytes(self.uri(path), data)
        return FileEntry(path=path, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())

    def check(self) -> None:
        """
        Raises:
            OutOfReachError: another run has taken the directory over.
        """
        if self._lease is not None:
            self._lease.check()

    @property
    def lost(self) -> OutOfReachError | None:
        """What ``check`` would raise, as far as it is known."""
        return None if self._lease is None else self._lease.lost

    def publish(self, manifest: Manifest) -> None:
        """Write ``manifest.json``: from here on the directory is complete.

        Raises:
            StoreError: another run published first.
            OutOfReachError: another run has taken the directory over.
        """
        self.check()
        try:
            create_exclusively(self.uri(MANIFEST), manifest.model_dump_json(indent=1).encode())
        except TakenError as error:
            raise StoreError(f"{self.root}: another run published first") from error
        self.complete = True
        self.close()

    def tidy(self) -> None:
        """Delete what only the run needed, and what killed processes left of files. A run may be killed between
        publishing and this, so every later one of the same command does it, too."""
        if self.complete:
            delete(self.work())
            # Object stores show no file before it is whole.
            listed = list_files(self.root) if is_local(self.root) else []
            for path in (file.path for file in listed if is_partial(file.path)):
                delete(self.uri(path))

    def close(self) -> None:
        """Let another process have the directory."""
        if self._lease is not None:
            self._lease.release()
            self._lease = None


def publish_once(
    uri: str,
    identity: dict[str, Any],
    manifest_type: type[AnyManifest],
    fill: Callable[[Output], AnyManifest],
    *,
    restart: bool = False,
) -> AnyManifest:
    """Claim, fill, publish: what every job does.

    Continues an unfinished directory of the same identity, leaves a complete one alone, and returns its manifest.

    Args:
        identity: a JSON object that says what is being made, by which ``job``.
        fill: writes everything but the manifest, which it returns. After a kill it is called again, on what is there.
        restart: clear an unfinished directory, of whatever identity, and begin anew.

    Raises:
        StoreError: the directory belongs to something else, or cannot be written; and whatever ``fill`` raises.
        OutOfReachError: another run is writing it.
    """
    output = Output(uri, identity, restart=restart)
    if output.complete:
        logger.info("%s is complete: nothing to do", output.root)
        output.tidy()
        return open_manifest(output.root, manifest_type)
    with output:
        started = time.monotonic()
        try:
            manifest = fill(output)
            output.publish(manifest)
        except KeyboardInterrupt:
            if output.lost is not None:  # whoever has lost the directory interrupts itself
                raise output.lost from None
            raise
        except (StoreError, OutOfReachError):
            if not exists(output.uri(MANIFEST)):
                raise
            # Another run of the same command was first: there is one result, and it is whole.
            return open_manifest(output.root, manifest_type)
        output.tidy()
    logger.info("%s: published after %.0f s", output.root, time.monotonic() - started)
    return manifest
