"""Entry points, each one Ray job: ``python -m ray_jobs.NAME --help``."""

import os
import signal
import sys
from types import FrameType


def _leave(number: int, _: FrameType | None) -> None:
    os.write(2, b"interrupted; the same command goes on from here\n")
    os._exit(128 + number)


# Importing what a job needs takes seconds, in which there is nothing yet that would have to be ended in order.
if os.path.basename(sys.argv[0]) in ("-m", "captioner"):
    for number in (signal.SIGINT, signal.SIGTERM):
        if (
            signal.getsignal(number) != signal.SIG_IGN
        ):  # as children of a shell's background ignore Ctrl-C
            signal.signal(number, _leave)
