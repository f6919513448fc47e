"""Who writes a directory: one run at a time, as far as its file system can tell them apart.

A lease saves work; it is not what keeps a result whole. That is the manifest, which is created exclusively, and what
the job checks before. Locally the lease is a lock of the kernel's, which ends with its process. On S3 it is an object
that its owner changes by a conditional write every ``BEAT`` seconds. Whoever wants it watches the ETag: when that has
stayed the same for ``STALE`` seconds of the watcher's own clock, the owner is gone.
"""

import contextlib
import errno
import fcntl
import getpass
import json
import logging
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any, BinaryIO

from captioner.errors import CaptionerError, OutOfReachError
from captioner.storage.exclusive import TakenError, UnconditionalError, get, is_s3, put
from captioner.storage.faults import told
from captioner.storage.files import is_local, resolve

logger = logging.getLogger(__name__)

BEAT, LOOK, STALE = 10.0, 5.0, 60.0


class Lease:
    """The right to write a directory; this one is of a store where nothing keeps others out."""

    lost: OutOfReachError | None = None
    """Set when another run is known to have taken the directory over."""

    def check(self) -> None:
        """Called before a file is written that every run writes under the same name.

        Raises:
            OutOfReachError: another run has the directory now.
        """

    def release(self) -> None:
        """Let others have it."""


def take(uri: str, root: str, job: str, is_settled: Callable[[], bool]) -> Lease | None:
    """Have the directory ``root``, whose lease is the file ``uri``.

    Args:
        job: what is done, to be told to others who want it.
        is_settled: whether the directory is published by now; asked while waiting.

    Returns:
        None where it was published while this waited.

    Raises:
        OutOfReachError: another run has it.
        StoreError: the lease cannot be written.
    """
    owner = {
        "job": job,
        "submission": _submission(),
        "process": os.getpid(),
        "user": _user(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }
    if is_local(uri):
        return _LocalLease(uri, root, owner)
    if is_s3(uri):
        return _ObjectLease.take(uri, root, owner, is_settled)
    logger.warning("%s: no leases on this kind of store: run one command at a time", root)
    return Lease()


def _user() -> str:
    with contextlib.suppress(KeyError, OSError):  # no name for the number
        return getpass.getuser()
    return str(os.getuid())


def _submission() -> str | None:
    """Id of the job that Ray's job server runs this process as."""
    config = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    found = config.get("metadata", {}).get("job_submission_id")
    return None if found is None else str(found)


def _taken(root: str, data: bytes) -> OutOfReachError:
    """What is told to whoever wants a directory that another run has."""
    try:
        owner = json.loads(data)
        job = f"job {owner['submission']}, " if owner["submission"] else ""
        who = (
            f": {owner['job']}, {job}process {owner['process']} of {owner['user']} on {owner['host']}, "
            f"since {owner['since']}"
        )
    except (ValueError, KeyError, TypeError):
        who = ""
    return OutOfReachError(
        f"{root} is being written by another process{who}: let it end, or end it"
    )


class _LocalLease(Lease):
    """A lock that dies with its process, so a killed run never blocks the one that continues it."""

    def __init__(self, uri: str, root: str, owner: dict[str, Any]):
        path = resolve(uri)[1]
        self._file: BinaryIO | None = None
        try:
            while self._file is None:
                os.makedirs(os.path.dirname(path), exist_ok=True)
                self._file = self._lock(path, root)
            self._file.truncate(0)
            self._file.write(json.dumps(owner).encode())
            self._file.flush()
        except OSError as error:
            self.release()
            raise told("write", uri, error) from error

    def _lock(self, path: str, root: str) -> BinaryIO | None:
        """None where the file was deleted by its last owner before it was locked."""
        file = open(path, "a+b")  # noqa: SIM115 held until the run ends
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # Some network file systems offer no locks; the manifest still decides there.
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                file.seek(0)
                with file:
                    raise _taken(root, file.read()) from None
            logger.warning("%s: no locks here (%s): run one command at a time", root, error)
            return file
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(file.fileno())):
                return file
        file.close()
        return None

    def release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class _ObjectLease(Lease):
    def __init__(self, uri: str, root: str, owner: dict[str, Any]):
        self._uri, self._root, self._owner = uri, root, owner
        self._mine = uuid.uuid4().hex
        self._beats = 0
        self._tag: str | None = None
        self._renewed = 0.0
        self._changing = threading.Lock()
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True)
        # A run that goes on after it has lost its directory works for nothing: it is interrupted where it can be.
        self._interrupts = threading.current_thread() is threading.main_thread()

    @classmethod
    def take(
        cls, uri: str, root: str, owner: dict[str, Any], is_settled: Callable[[], bool]
    ) -> "Lease | None":
        lease = cls(uri, root, owner)
        try:
            while not lease._try(None):
                if is_settled():
                    return None
                if lease._outlast(is_settled):
                    break
            if not lease._is_exclusive():
                raise UnconditionalError(uri)
        except UnconditionalError:
            logger.warning(
                "%s: this store has no conditional writes, so nothing keeps a second command from the same work: "
                "run one at a time",
                root,
            )
            return Lease()
        lease._thread.start()
        return lease

    def _body(self, *, released: bool = False) -> bytes:
        self._beats += 1
        own = {"lease": self._mine, "beat": self._beats, "released": released}
        return json.dumps(self._owner | own).encode()

    def _try(self, tag: str | None) -> bool:
        """Take it where it is still what it was."""
        try:
            self._tag = put(self._uri, self._body(), tag)
        except TakenError:
            return False
        self._renewed = time.time()
        return True

    def _outlast(self, is_settled: Callable[[], bool]) -> bool:
        """Watch another's lease until it is free, and take it. False where it is to be tried anew.

        Raises:
            OutOfReachError: its owner works.
        """
        tag: str | None = None
        since = 0.0
        while True:
            asked = time.monotonic()
            found = get(self._uri)
            if found is None or is_settled():
                return False
            data, seen = found
            if _is_released(data):
                return self._try(seen)
            now = time.monotonic()
            if tag is None:
                logger.info(
                    "%s: a run has it; looking up to %.0f s whether it lives", self._root, STALE
                )
            if tag is None or now - asked > BEAT:
                # While the store did not answer, the owner had no answer either.
                tag, since = tag or seen, now
            if seen != tag:
                raise _taken(self._root, data)
            elif now - since >= STALE:
                return self._try(seen)
            time.sleep(LOOK)

    def _is_exclusive(self) -> bool:
        """Whether the store heeds conditions: some take them and write all the same."""
        try:
            self._tag = put(self._uri, self._body(), '"0"')
        except TakenError:
            return True
        return False

    def _keep(self) -> None:
        while not self._released.wait(BEAT):
            with contextlib.suppress(CaptionerError):  # tried again at the next beat
                self._beat()
            if self.lost is not None:
                if self._interrupts and not self._released.is_set():
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
                return

    def _beat(self) -> None:
        with self._changing:
            if self.lost is not None or self._released.is_set() or self._try(self._tag):
                return
            found = get(self._uri)
            if found is not None and self._mine.encode() in found[0]:
                self._tag = found[1]  # the answer to an earlier beat was lost
                return
            self.lost = _taken(self._root, found[0] if found else b"")

    def check(self) -> None:
        # By the clock that goes on while a machine sleeps.
        if time.time() - self._renewed > STALE / 2:
            self._beat()
        if self.lost is not None:
            raise self.lost

    def release(self) -> None:
        self._released.set()
        with self._changing, contextlib.suppress(CaptionerError):
            if self.lost is None and self._tag is not None:
                put(self._uri, self._body(released=True), self._tag)
            self._tag = None


def _is_released(data: bytes) -> bool:
    try:
        return bool(json.loads(data)["released"])
    except (ValueError, KeyError, TypeError):
        return True  # nobody's
