"""Outages of the store that a task reads from: waited for, up to a time, and told apart from pictures that are bad."""

import random
import time
from collections.abc import Callable
from typing import TypeVar

from captioner.artifacts.tables import FINAL, RETRYABLE
from captioner.errors import OutOfReachError
from captioner.storage import is_local
from captioner.storage.faults import Fault, fault_of, told

Result = TypeVar("Result")

RETRY_SECONDS = 60.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 8.0


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
        if fault_of(error) == Fault.DENIED and not is_local(uri):
            raise told("read", uri, error) from error
        if kind_of(error) == FINAL:
            return False
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
