"""Outages of the store that a task reads from: waited for, up to a time, and told apart from pictures that are bad."""

import os
import random
import re
import time
from collections.abc import Callable
from typing import TypeVar

import pyarrow as pa
from pyarrow.fs import FileSystem, FileType, LocalFileSystem

from captioner.artifacts.tables import FINAL, RETRYABLE
from captioner.errors import CaptionerError, OutOfReachError, SourceError, StoreError
from captioner.storage import is_local
from captioner.storage.faults import Fault, fault_of, one_line, told

Result = TypeVar("Result")

RETRY_SECONDS = 60.0
# What reading a table raises, its texts in other encodings than they must have included.
TABLE_ERRORS = (pa.ArrowException, StoreError, OSError, UnicodeDecodeError)
_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 8.0
# Before it stands the key, and behind it what the server said.
_OF_ARROW = re.compile(r"AWS Error [^:]+ during \w+ operation")


class Outage:
    """What a task knows of the store it reads from. An outage begins with a fault that passes, and ends with the next
    thing that is read: one that lasts is waited for once, however many pictures the task has.
    """

    def __init__(self, seconds: float = RETRY_SECONDS):
        """
        Args:
            seconds: how long an outage is waited for.
        """
        self._seconds = seconds
        self._since: float | None = None
        self._pause = _FIRST_PAUSE

    def over(self) -> None:
        """Something was read."""
        self._since, self._pause = None, _FIRST_PAUSE

    def wait(self, error: Exception, uri: str) -> bool:
        """Whether to read again what gave this error, which is after a pause: longer from try to try, and of no fixed
        length, for a store that says "slow down" says so to many at once.

        Raises:
            StoreError: access to a remote store is denied: to every picture, and until somebody mends it.
        """
        if is_of_picture(error, uri):
            return False
        if kind_of(error) == FINAL:
            raise told("read", uri, error) from error
        now = time.monotonic()
        if self._since is None:
            self._since = now
        left = self._since + self._seconds - now
        if left <= 0:
            return False
        time.sleep(min(left, self._pause * random.uniform(0.5, 1.0)))
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        return True


def kind_of(error: Exception) -> str:
    """Whether another try, later, may read what gave this error."""
    passing = isinstance(error, OutOfReachError) or fault_of(error) == Fault.PASSING
    return RETRYABLE if passing else FINAL


def is_of_picture(error: Exception, uri: str) -> bool:
    """Whether it is about the one picture, not about the store that it lies on."""
    denied = fault_of(error) == Fault.DENIED and not is_local(uri)
    return kind_of(error) == FINAL and not denied


def reason_of(error: Exception) -> str:
    """Why something could not be read, in words that are the same for every picture."""
    text = one_line(error)
    found = _OF_ARROW.search(text)
    return found[0] if found else text


def of_place(error: Exception, filesystem: FileSystem, folder: str) -> Exception:
    """The error itself, or that the whole folder is gone: a disk, say, and not its pictures."""
    if fault_of(error) == Fault.ABSENT and _is_gone(filesystem, folder):
        return OutOfReachError(f"{folder} is gone")
    return error


def _is_gone(filesystem: FileSystem, folder: str) -> bool:
    try:
        if filesystem.get_file_info(folder).type == FileType.NotFound:
            return True
        # Where a disk is not mounted, nothing is there.
        return isinstance(filesystem, LocalFileSystem) and not os.listdir(folder)
    except OSError:
        return True


def told_of(what: str, error: Exception) -> CaptionerError:
    """Why a source cannot be used as it is, or not now."""
    kind = OutOfReachError if kind_of(error) == RETRYABLE else SourceError
    return kind(f"{what}: {one_line(error)}")


def patiently(seconds: float, call: Callable[[], Result]) -> Result:
    """What ``call`` returns, which is tried again while something is out of reach, for so many seconds.

    Raises:
        OutOfReachError: it still is; and whatever else ``call`` raises.
    """
    outage = Outage(seconds)
    while True:
        try:
            return call()
        except OutOfReachError as error:
            if not outage.wait(error, ""):
                raise
