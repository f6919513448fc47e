"""The tests' own exit status: pytest's, whatever happens while the interpreter is taken down."""

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
# A plugin that finds fault when all tests have passed, as those that measure coverage do.
PLUGIN = """
import pytest

@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    session.exitstatus = 3
"""


@pytest.mark.parametrize(
    ("passes", "plugin", "status"), [(True, "", 0), (False, "", 1), (True, PLUGIN, 3)]
)
def test_a_crash_at_exit_changes_no_status(
    tmp_path: Path, passes: bool, plugin: str, status: int
) -> None:
    (tmp_path / "test_it.py").write_text(TEST.format(passes=passes))
    (tmp_path / "conftest.py").write_text(plugin)
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
    assert ("1 passed" if passes else "1 failed") in run.stdout, run.stdout + run.stderr
    assert run.returncode == status
