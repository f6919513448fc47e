"""The cause of what ended a job is told in one line, however Ray has wrapped it."""

import pytest
from ray.exceptions import RayTaskError
from ray.train import ControllerError, WorkerGroupError

from captioner.errors import StoreError
from captioner.runtime.failures import cause

BROKEN = RuntimeError("a wheel\ncame off")
ADVICE = "\nFailed to apply UDF transform after 1/1 attempts (total backoff 0.0s).\nTo change ..."


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (BROKEN, "RuntimeError: a wheel came off"),
        (KeyError(), "KeyError"),
        (StoreError("s3://bucket: denied"), "s3://bucket: denied"),
        (RuntimeError(f"{BROKEN}{ADVICE}"), "RuntimeError: a wheel came off"),
        (
            RayTaskError("work", "Traceback ...\n" * 100, BROKEN).as_instanceof_cause(),
            "RuntimeError: a wheel came off",
        ),
        (
            WorkerGroupError("of 2 workers 1 failed", {1: RayTaskError("work", "...", BROKEN)}),
            "RuntimeError: a wheel came off",
        ),
        (ControllerError(BROKEN), "RuntimeError: a wheel came off"),
        (ValueError("x" * 40 + " y" * 1000), f"ValueError: {'x' * 40}{' y' * 128} ..."),
    ],
)
def test_of_a_failure_the_innermost_error_is_told(error: Exception, line: str) -> None:
    assert cause(error) == line
