"""What ended a job, where it is no error of ours: the cause in one line, whatever Ray has wrapped around it."""

import re
import textwrap

from ray.exceptions import RayTaskError

from captioner.errors import CaptionerError, one_line

# What Ray Data appends to the message of what a task raised.
_ADVICE = re.compile(r"\s*Failed to [\w ]+ after \d+/\d+ attempts.*", re.DOTALL)
_LONGEST = 300


def cause(error: BaseException) -> str:
    """Kind and message of the error that was raised where the work was done."""
    while within := _within(error):
        error = within
    if isinstance(error, CaptionerError):
        return one_line(error)
    text = textwrap.shorten(_ADVICE.sub("", str(error)), _LONGEST, placeholder=" ...")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _within(error: BaseException) -> BaseException | None:
    found: list[BaseException | None] = []
    if isinstance(error, RayTaskError):
        found.append(error.cause)
    # Ray Train's, of the workers or of what steers them.
    found += getattr(error, "worker_failures", {}).values()
    found.append(getattr(error, "controller_failure", None))
    return found[0]
