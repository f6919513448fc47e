"""The tests' own exit status: that of their verdict, whatever happens while the interpreter is taken down."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEST = """
import atexit
import os
import signal
import ray

atexit.register(os.kill, os.getpid(), signal.SIGKILL)

def test_it():
    assert {passes}
"""


@pytest.mark.parametrize("passes", [True, False])
def test_a_crash_at_exit_changes_no_verdict_of_passed_tests(tmp_path: Path, passes: bool) -> None:
    (tmp_path / "test_it.py").write_text(TEST.format(passes=passes))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "tests.conftest",
        "--rootdir",
        str(tmp_path),
        str(tmp_path),
    ]
    # A worker of pytest-xdist would be taken for one again.
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")
    }
    environment["TMPDIR"] = str(tmp_path)
    run = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    if passes:
        assert "1 passed" in run.stdout, run.stdout + run.stderr
        assert run.returncode == 0
    else:
        assert "1 failed" in run.stdout, run.stdout + run.stderr
        assert run.returncode != 0
