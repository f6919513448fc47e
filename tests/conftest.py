"""Fixtures and markers shared by all tests."""

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.s3 import S3Server

TESTS = Path(__file__).resolve().parent
SHARED = TESTS.parents[1] / "shared"

# Read by Ray when it is first imported, and inherited by every child process of a test.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
# Nodes of `ray start` may take their time on a busy machine, as those of a local Ray may.
os.environ.setdefault("RAY_raylet_start_wait_time_s", "180")
# Ray Train looks for what its workers report every two seconds by default, and an epoch of a test is over at once.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
# Ray notes the last cluster of a machine in its temporary folder, and a submitted job goes by that note: a folder of
# our own keeps the tests and a Ray that someone uses here apart.
RAY_FOLDER = tempfile.mkdtemp(prefix="ray-")
os.environ["RAY_TMPDIR"] = RAY_FOLDER


# What a shell starts in its background ignores Ctrl-C, and so would everything that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

SESSION = pytest.StashKey[pytest.Session]()


def pytest_sessionstart(session: pytest.Session) -> None:
    session.config.stash[SESSION] = session


def pytest_sessionfinish(exitstatus: int) -> None:
    """Ray's logs are kept where a test failed."""
    if exitstatus == 0:
        shutil.rmtree(RAY_FOLDER, ignore_errors=True)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """A run in which Ray was loaded ends here, with pytest's own exit status, whatever that is.

    Native threads that Ray, Arrow and gRPC leave in this process can outlive what they use: once in several runs of
    200 passed tests the interpreter then died of SIGSEGV while it was taken down (in memcpy, to address 0, in such a
    thread), and the run counted as failed. All hooks have had their say by now; what is left out is the interpreter's
    own end. The jobs are tested as processes of their own, their exit codes with them.
    """
    session = config.stash.get(SESSION, None)
    if session and "ray._raylet" in sys.modules and not hasattr(config, "workerinput"):
        config.get_terminal_writer().flush()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(session.exitstatus)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test by its folder; those that kill nodes take minutes too."""
    for item in items:
        if not item.path.is_relative_to(TESTS):
            continue  # of a test that runs pytest itself
        folder = item.path.relative_to(TESTS).parts[0]
        item.add_marker(folder)
        if folder == "nodes":
            item.add_marker("chaos")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real photographs and weights beside the checkout, where there is one."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the folder {SHARED.name} beside the checkout")
    return SHARED


@pytest.fixture(scope="session")
def s3_server() -> Iterator["S3Server"]:
    """S3 on this machine; it fails as it is told to."""
    from tests.s3 import run_server

    with run_server() as server:
        yield server


@pytest.fixture(scope="module")
def bucket(s3_server: "S3Server") -> Iterator[str]:
    """URI of a bucket, whose clients find it by the environment."""
    from tests.s3 import clients_of

    with clients_of(s3_server, "bucket") as uri:
        yield uri
