"""How finely a run's work is cut, by how fast it turns out to go: a kill may cost some time, however many rows."""

import time
from collections import deque

# Seconds of work in a file at most, and in what an encoder is handed at a time.
FILE_SECONDS, TASK_SECONDS = 30.0, 10.0
# Rows that an encoder is handed at a time: at first, when nobody knows how fast it is, and at most.
FIRST_ROWS, MOST_ROWS = 8, 64
# Arrivals of an encoder's rows that its rate is taken from.
_REMEMBERED = 8


class Pace:
    """Decides, as rows come out of the encoders, when a file is full and how many rows make the next tasks.

    Of use to one thread, the one that schedules the run. Times are those of ``time.monotonic``.
    """

    def __init__(self, encoders: int, rows_per_file: int):
        """
        Args:
            encoders: how many work side by side.
            rows_per_file: most rows of a file, however fast they come.
        """
        self._encoders, self._rows_per_file = encoders, rows_per_file
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
        self.rows_per_task = min(max(int(rate * TASK_SECONDS), 1), MOST_ROWS)
        full = pending >= self._rows_per_file or now + arrived / rate - self._opened > FILE_SECONDS
        if full:
            self._pending = 0
        return full


def _or_now(now: float | None) -> float:
    return time.monotonic() if now is None else now
