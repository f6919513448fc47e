"""Directories that appear all at once, each written by one job.

A published directory is claimed by ``_job.json`` (what is being made), filled, and completed by ``manifest.json``,
written last. Readers open a directory only through its manifest, so they never see half of one. What a job needs only
while it runs lies in ``_work``, which goes once the manifest is there.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import time
from collections.abc import Callable
from typing import Any, BinaryIO

from captioner.artifacts.manifests import (
    MANIFEST,
    AnyManifest,
    FileEntry,
    Manifest,
    open_manifest,
)
from captioner.errors import StoreError
from captioner.storage.files import (
    absolute,
    create_exclusively,
    exists,
    is_local,
    join,
    list_files,
    read_json,
    resolve,
    write_bytes,
)

logger = logging.getLogger(__name__)

CLAIM, WORK = "_job.json", "_work"


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
    a complete one of the same identity is reported by ``complete``, an unfinished one is continued (``resumed``).

    Raises:
        StoreError: the directory belongs to something else, or is being written by a live process of this machine.
    """

    def __init__(self, uri: str, identity: dict[str, Any]):
        self.root = absolute(uri)
        self.complete = exists(self.uri(MANIFEST))
        self.resumed = False
        self._lock: BinaryIO | None = None
        if exists(self.uri(CLAIM)):
            different = differences(read_json(self.uri(CLAIM)), json.loads(json.dumps(identity)))
            if different:
                raise StoreError(f"{self.root} was made by another run: {'; '.join(different)}")
            self.resumed = not self.complete
        elif list_files(self.root):
            raise StoreError(
                f"{self.root} is not empty and was not made by this job: choose another"
            )
        if self.complete:
            return
        if not self.resumed:
            create_exclusively(self.uri(CLAIM), json.dumps(identity, indent=1).encode())
        self._hold()

    def __enter__(self) -> "Output":
        return self

    def __exit__(self, *_: object) -> None:
        # A failed job must let go of its directory even where its process, a notebook, lives on.
        self.close()

    def _hold(self) -> None:
        # flock dies with its process, so a killed run never blocks the one that continues it. Object stores have no
        # such lock; there the exclusive manifest decides.
        if is_local(self.root):
            self._lock = open(resolve(self.uri(CLAIM))[1], "rb")  # noqa: SIM115 held until the process ends
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                # Some network file systems offer no locks; the manifest still decides there.
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    raise StoreError(f"{self.root} is being written by another process") from None
                logger.warning("no file lock on %s: %s", self.root, error)

    def uri(self, *parts: str) -> str:
        """URI of something inside the directory."""
        return join(self.root, *parts)

    def work(self, *parts: str) -> str:
        """URI of something that is needed only until the directory is published."""
        return self.uri(WORK, *parts)

    def write(self, path: str, data: bytes) -> FileEntry:
        """Write a whole file, and say what the manifest lists of it."""
        write_bytes(self.uri(path), data)
        return FileEntry(path=path, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())

    def publish(self, manifest: Manifest) -> None:
        """Write ``manifest.json``: from here on the directory is complete.

        Raises:
            StoreError: another run published first.
        """
        create_exclusively(self.uri(MANIFEST), manifest.model_dump_json(indent=1).encode())
        self.complete = True
        self.close()

    def clear_work(self) -> None:
        """Delete what only the run needed. A run may be killed between publishing and this, so every later one of the
        same command does it, too."""
        if self.complete and exists(self.work()):
            filesystem, path = resolve(self.work())
            # Another run of the command may delete it at the same time.
            with contextlib.suppress(FileNotFoundError):
                filesystem.delete_dir(path)

    def close(self) -> None:
        """Let another process of this machine have the directory."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def publish_once(
    uri: str,
    identity: dict[str, Any],
    manifest_type: type[AnyManifest],
    fill: Callable[[Output], AnyManifest],
) -> AnyManifest:
    """Claim, fill, publish: what every job does.

    Continues an unfinished directory of the same identity, leaves a complete one alone, and returns its manifest.

    Args:
        identity: a JSON object that says what is being made.
        fill: writes everything but the manifest, which it returns. After a kill it is called again, on what is there.

    Raises:
        StoreError: the directory belongs to something else, or cannot be written; and whatever ``fill`` raises.
    """
    output = Output(uri, identity)
    if output.complete:
        logger.info("%s is complete: nothing to do", output.root)
        output.clear_work()
        return open_manifest(output.root, manifest_type)
    with output:
        started = time.monotonic()
        manifest = fill(output)
        try:
            output.publish(manifest)
        except StoreError:
            if not exists(output.uri(MANIFEST)):
                raise
            # Another run of the same command was first: there is one result, and it is whole.
            return open_manifest(output.root, manifest_type)
        output.clear_work()
    logger.info("%s: published after %.0f s", output.root, time.monotonic() - started)
    return manifest
