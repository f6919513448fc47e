"""What people see of a job: its own lines, and nothing else.

Ray, its native code and the libraries write to the process's two streams as they like. From the moment a job starts Ray
those lead to a log in Ray's session, and the job's own lines go where the streams led before.
"""

import contextlib
import fcntl
import logging
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import IO, TextIO

# Loggers whose lines are a job's own.
_OURS = ("captioner", "ray_jobs", "benchmarks")
_OUT, _ERR = 1, 2
# Between two lines of progress where none can be rewritten.
_SECONDS = 10.0
_CLEAR = "\r\033[K"


class Screen:
    """Where lines for people go. Outside of a job these are Python's two streams, whatever they are."""

    def __init__(self) -> None:
        self.quiet = False
        """Whether what is not the job's own is kept from the screen."""
        self.log: str | None = None
        """The file that has it instead."""
        self._log: IO[str] | None = None
        self._shown: dict[int, int] = {}
        self._lock = threading.RLock()
        self._passing = ""
        self._passed = time.monotonic()

    @contextlib.contextmanager
    def job(self, *, verbose: bool) -> Iterator[None]:
        """While the block runs, logged lines of ours are shown, and those of others only where ``verbose``.

        Streams that are not the process's own (a notebook's, a test's) are never led elsewhere.
        """
        self.quiet = not verbose and _are_plain()
        root = logging.getLogger()
        handlers: list[tuple[logging.Logger, logging.Handler]] = [
            (logger, _Shown(self))
            for logger in ([root] if verbose else map(logging.getLogger, _OURS))
        ]
        if not verbose:
            # It sets its own level when it is imported, and warns of every retry; what comes of them we say.
            os.environ.setdefault("HF_HUB_VERBOSITY", "error")
            logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
        if not self._is_terminal:
            # Bars that rewrite themselves; the variables are read when the libraries are imported.
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
            os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
            if "huggingface_hub" in sys.modules:
                sys.modules["huggingface_hub"].utils.disable_progress_bars()
        if self.quiet:
            self._log = tempfile.TemporaryFile("w+", errors="backslashreplace")
            logged = logging.StreamHandler(self._log)
            logged.setFormatter(
                logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
            )
            handlers.append((root, logged))
        for logger, handler in handlers:
            logger.addHandler(handler)
            logger.setLevel(logging.INFO)
        try:
            yield
        finally:
            # What ended the block has the last word.
            self.pass_by("", last=True)
            for logger, handler in handlers:
                logger.removeHandler(handler)

    def hide_others(self) -> None:
        """From now on until the process ends its two streams lead to the log, and ours to where they led."""
        if not self.quiet or self._shown:
            return
        assert self._log is not None
        sys.stdout.flush()
        sys.stderr.flush()
        for number in (_OUT, _ERR):
            # Children of this process do not get it, so nobody waits for them who waits for its end.
            self._shown[number] = fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, 3)
            os.dup2(self._log.fileno(), number)

    def keep_log(self, folder: str) -> None:
        """Give the log a name in a folder, or in that of temporary files where it may not be written."""
        if self._log is None or self.log is not None:
            return
        for place in (folder, tempfile.gettempdir()):
            path = os.path.join(place, f"captioner-{os.getpid()}.log")
            with contextlib.suppress(OSError):
                named = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
                os.write(named, os.pread(self._log.fileno(), 2**24, 0))
                for number in (self._log.fileno(), *self._shown):
                    os.dup2(named, number, inheritable=number in self._shown)
                os.close(named)
                self.log = path
                return

    @property
    def hides(self) -> bool:
        """Whether the process's own streams lead to the log."""
        return bool(self._shown)

    def show(self, text: str) -> None:
        """What a job is asked for, on the standard output; a reader may leave before its end."""
        with self._lock, contextlib.suppress(BrokenPipeError):
            self._erase()
            self._write(_OUT, f"{text}\n")

    def say(self, text: str) -> None:
        """A line about what goes on, on the standard error. A job goes on without a screen."""
        with self._lock, contextlib.suppress(OSError):
            self._erase()
            self._write(_ERR, f"{text}\n{self._passing}")

    def say_at_last(self, text: str) -> None:
        """The same from a thread that ends the process, whatever other threads are at."""
        clear = _CLEAR if self._is_terminal else ""
        os.write(self._shown.get(_ERR, _ERR), f"{clear}{text}\n".encode(errors="backslashreplace"))

    def wait_for(self, text: str) -> None:
        """What takes a while now, on a terminal, until the next line."""
        if self._is_terminal:
            self.pass_by(f"{text} ...")

    def pass_by(self, text: str, *, last: bool = False) -> None:
        """A line that the next of its kind replaces on a terminal; in a log, one every ten seconds and the ``last``.

        Args:
            text: may be empty, which leaves no line.
        """
        if not self._is_terminal:
            now = time.monotonic()
            if text and (last or now - self._passed >= _SECONDS):
                self._passed = now
                self.say(text)
            return
        with self._lock, contextlib.suppress(OSError):
            self._erase()
            # A longer one would leave its beginning behind. Some terminals say that they have no width.
            width = os.get_terminal_size(self._shown.get(_ERR, _ERR)).columns or 80
            self._passing = "" if last else text[: width - 1]
            self._write(_ERR, f"{text}\n" if last and text else self._passing)

    def _erase(self) -> None:
        if self._passing:
            self._write(_ERR, _CLEAR)

    def _write(self, number: int, text: str) -> None:
        stream: TextIO = sys.stdout if number == _OUT else sys.stderr
        if number not in self._shown:
            stream.write(text)
            stream.flush()
            return
        data = text.encode(stream.encoding, "backslashreplace")
        while data:
            data = data[os.write(self._shown[number], data) :]

    @property
    def _is_terminal(self) -> bool:
        """Of the standard error."""
        return os.isatty(self._shown[_ERR]) if self._shown else sys.stderr.isatty()


class _Shown(logging.Handler):
    def __init__(self, screen: Screen):
        super().__init__()
        self._screen = screen

    def emit(self, record: logging.LogRecord) -> None:
        self._screen.say(self.format(record))


def _are_plain() -> bool:
    try:
        return (sys.stdout.fileno(), sys.stderr.fileno()) == (_OUT, _ERR)
    except (OSError, AttributeError):  # a StringIO; a process without streams
        return False


SCREEN = Screen()
