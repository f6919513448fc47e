"""How finely a run's work is cut, by how fast it turns out to go: a kill may cost some time, however many rows."""

import time
from collections import deque
from collections.abc import Iterator

# Seconds of work in a file at most, and in what an encoder is handed at a time.
FILE_SECONDS, TASK_SECONDS = 30.0, 10.0
# Rows that an encoder is handed at a time: at first, when nobody knows how fast it is, and at most, where its batches
# are no larger.
FIRST_ROWS, MOST_ROWS = 8, 64
# Seconds of work after which an actor says how far it is.
_SAID_SECONDS = 2.0
# Arrivals of an encoder's rows that its rate is taken from.
_REMEMBERED = 8


class Pace:
    """Decides, as rows come out of the encoders, when a file is full and how many rows make the next tasks.

    Of use to one thread, the one that schedules the run. Times are those of ``time.monotonic``.
    """

    def __init__(self, encoders: int, rows_per_file: int, *, most_rows: int = MOST_ROWS):
        """
        Args:
            encoders: how many work side by side.
            rows_per_file: most rows of a file, however fast they come.
            most_rows: that an encoder is handed at a time.
        """
        self._encoders, self._rows_per_file = encoders, rows_per_file
        self._most_rows = most_rows
        self._arrivals: deque[tuple[float, int]] = deque(maxlen=_REMEMBERED * encoders + 1)
        self._pending = 0
        self._opened = 0.0
        self.rows_per_task = FIRST_ROWS

    def started(self, now: float | None = None) -> None:
        """The first encoder has begun with its first rows."""
        self._arrivals.append((_or_now(now), 0))

    @property
    def is_started(self) -> bool:
        return bool(self._arrivals)

    def is_file_full(self, pending: int, now: float | None = None) -> bool:
        """Whether the rows that wait to be written are to be a file: asked whenever some have joined them.

        Full is also what would wait too long for the next rows of the same encoder.

        Args:
            pending: how many wait.
        """
        now = _or_now(now)
        arrived, self._pending = pending - self._pending, pending
        if arrived == pending:
            self._opened = now
        self._arrivals.append((now, arrived))
        first, *later = self._arrivals
        # Of one encoder, rows a second.
        rate = sum(rows for _, rows in later) / max(now - first[0], 1e-6) / self._encoders
        self.rows_per_task = min(max(int(rate * TASK_SECONDS), 1), self._most_rows)
        full = pending >= self._rows_per_file or now + arrived / rate - self._opened > FILE_SECONDS
        if full:
            self._pending = 0
        return full


class Portions:
    """Cuts the rows that an actor is handed at a time into portions of some two seconds: who watches sees them done."""

    def __init__(self) -> None:
        self._rows = FIRST_ROWS

    def cut(self, rows: int) -> Iterator[slice]:
        """Slices that together are ``rows``; each is to be worked on before the next is asked for.

        They have powers of two in them, and what is left over: networks like to see the same shapes again.
        """
        start = 0
        while start < rows:
            end = min(start + self._rows, rows)
            begun = time.monotonic()
            yield slice(start, end)
            rate = (end - start) / max(time.monotonic() - begun, 1e-6)
            self._rows = 1 << max(int(rate * _SAID_SECONDS), 1).bit_length() - 1
            start = end


def _or_now(now: float | None) -> float:
    return time.monotonic() if now is None else now
