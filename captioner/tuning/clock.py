"""The time that a search has taken, which outlives its runs."""

import contextlib
import json
import time

from captioner import storage
from captioner.errors import StoreError


class Clock:
    """How long the trials of a search have run, all runs of its command together."""

    def __init__(self, uri: str):
        """
        Raises:
            StoreError: the file cannot be read.
        """
        self._uri, self._started = uri, time.monotonic()
        self._before = float(storage.read_json(uri)) if storage.exists(uri) else 0.0

    def left(self, minutes: float | None) -> float | None:
        """Seconds left of so many minutes, 0 at least; None of None."""
        spent = self._before + time.monotonic() - self._started
        return None if minutes is None else max(0.0, 60 * minutes - spent)

    def save(self) -> None:
        """Keep it in its file; where that is out of reach, a later call may."""
        spent = self._before + time.monotonic() - self._started
        with contextlib.suppress(StoreError):
            storage.write_bytes(self._uri, json.dumps(spent).encode())
