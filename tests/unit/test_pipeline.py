"""How much a run of Ray Data loads, encodes and writes at a time, and what is said of one that fails."""

import errno
from pathlib import Path

import pytest
from ray.exceptions import RayTaskError

from captioner.artifacts.output import Output
from captioner.artifacts.tables import feature_rows
from captioner.encoders.spec import FeatureShape
from captioner.errors import OutOfReachError, StoreError
from captioner.features.extract import _begun_with
from captioner.features.pace import (
    FILE_SECONDS,
    FIRST_ROWS,
    MOST_ROWS,
    TASK_SECONDS,
    Pace,
    Portions,
)
from captioner.features.pipeline import _told, rows_per_file


def test_files_are_a_hundredth_of_all_rows_and_fit_in_memory() -> None:
    vectors, grids = (
        feature_rows(FeatureShape(2048, 2048, 7, 7), grid=grid) for grid in (False, True)
    )
    assert rows_per_file(7_000, vectors) == 70
    assert rows_per_file(10, vectors) == 1
    assert rows_per_file(10_000_000, vectors) == 128 * 2**20 // (4 * 2048)
    assert rows_per_file(10_000_000, grids) * (4 * 2048 + 2 * 49 * 2048) <= 128 * 2**20


@pytest.mark.parametrize("encoders", [1, 2, 16])
@pytest.mark.parametrize("seconds", [0.0001, 0.01, 0.5, 5.0, 40.0])
def test_files_and_tasks_last_as_long_as_they_may_however_fast_encoders_are(
    encoders: int, seconds: float
) -> None:
    pace = Pace(encoders, 10**9)
    pace.started(0.0)
    # Tasks are cut before it is known how fast they are: each encoder has a second one waiting.
    waiting = [(FIRST_ROWS * seconds, FIRST_ROWS) for _ in range(2 * encoders)]
    free = [waiting[number][0] for number in range(encoders)]
    rows_waiting = [FIRST_ROWS] * encoders
    now, pending, opened, files = 0.0, 0, 0.0, []
    sizes: list[int] = []
    for _ in range(200 * encoders):
        encoder = free.index(min(free))
        now, rows = free[encoder], rows_waiting[encoder]
        if not pending:
            opened = now
        pending += rows
        sizes.append(rows)
        if pace.is_file_full(pending, now):
            files.append(now - opened)
            pending = 0
        rows_waiting[encoder] = pace.rows_per_task
        free[encoder] = now + rows_waiting[encoder] * seconds
    assert max(files, default=0) <= FILE_SECONDS
    settled = sizes[3 * encoders :]
    assert max(settled) * seconds <= TASK_SECONDS * 1.5 or max(settled) == 1
    if seconds <= 0.01:
        assert settled[-1] == MOST_ROWS
    # Nothing is cut finer than it must be.
    assert max(settled) == 1 or max(settled) == MOST_ROWS or max(settled) * seconds >= 3


def test_an_encoder_of_large_batches_is_handed_whole_ones() -> None:
    pace = Pace(1, 10**9, most_rows=256)
    pace.started(0.0)
    pace.is_file_full(256, 0.05)
    assert pace.rows_per_task == 256


def test_two_encoders_that_finish_at_once_do_not_pass_for_fast_ones() -> None:
    pace = Pace(2, 10**9)
    pace.started(0.0)
    pace.is_file_full(8, 80.0)
    pace.is_file_full(16, 80.001)
    assert pace.rows_per_task == 1


def test_a_file_holds_no_more_rows_than_it_may() -> None:
    pace = Pace(1, 20)
    pace.started(0.0)
    full = [pace.is_file_full(rows, rows / 1000) for rows in (8, 16, 24)]
    assert full == [False, False, True]


def test_an_error_of_ours_comes_back_from_a_task_as_it_was_raised() -> None:
    advice = (
        "\nFailed to read after 1/1 attempts (total backoff 0.0s).\nTo change retry attempts ..."
    )
    denied = StoreError(f"cannot read s3://b/a.jpg: AWS Error ACCESS_DENIED{advice}")
    full = OSError(errno.ENOSPC, "No space left on device", advice)
    away = OSError(f"AWS Error SLOW_DOWN during PutObject operation: x{advice}")
    for cause, kind, text in (
        (denied, StoreError, "cannot read s3://b/a.jpg: AWS Error ACCESS_DENIED"),
        (full, StoreError, "cannot write s3://b/out: No space left on device"),
        (
            away,
            OutOfReachError,
            "cannot write s3://b/out: AWS Error SLOW_DOWN during PutObject operation",
        ),
    ):
        raised = RayTaskError("task", "a traceback", cause, "task", 1, "127.0.0.1")
        found = _told(raised.as_instanceof_cause(), "s3://b/out")
        assert type(found) is kind
        assert str(found).startswith(text)
        assert "\n" not in str(found)
    ours = RayTaskError("task", "a traceback", KeyError("x"), "task", 1, "127.0.0.1")
    assert _told(ours.as_instanceof_cause(), "s3://b/out") is None


def test_a_run_keeps_its_arithmetic_and_what_is_published_does_whatever_is_asked(
    tmp_path: Path,
) -> None:
    root = str(tmp_path)
    assert _begun_with(root, restart=False) is None
    Output(root, {"job": "extract_features", "encoder": {"precision": "bfloat16"}}).close()
    assert _begun_with(root, restart=False) == "bfloat16"
    assert _begun_with(root, restart=True) is None
    (tmp_path / "manifest.json").write_text("{}")
    assert _begun_with(root, restart=True) == "bfloat16"


@pytest.mark.parametrize("seconds", [0.0001, 0.05, 0.3, 1.5, 7.0])
def test_an_actor_says_every_few_seconds_how_far_it_is(
    seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("captioner.features.pace.time.monotonic", lambda: now)
    portions = Portions()
    sizes: list[int] = []
    for rows in (64, 64, 37, 64):
        parts = []
        for part in portions.cut(rows):
            parts += list(range(rows))[part]
            sizes.append(part.stop - part.start)
            now += sizes[-1] * seconds
        assert parts == list(range(rows))
    settled = sizes[1:]
    assert max(settled) * seconds <= 2 or max(settled) == 1
    # Nothing is cut finer than it must be.
    assert max(settled) * seconds > 0.9 or max(settled) >= 37 or max(settled) == 1
