"""What a local Ray shows to the network and to the machine's other users: nothing."""

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.head import ROOT
from tests.processes import command_lines, descendants, listening

# A worker of its own and the dashboard's agents make every kind of process that a job has.
PROGRAM = """
import json, sys, ray
from captioner.runtime import cluster
cluster.start_ray()
ray.get(ray.remote(lambda: 1).remote())
found = ray.init(ignore_reinit_error=True)
print(json.dumps({"session": found.address_info["session_dir"], "dashboard": found.dashboard_url}), flush=True)
sys.stdin.read()
"""


@dataclass(frozen=True)
class LocalRay:
    pids: list[int]
    session: Path
    dashboard: str
    token: str
    token_file: Path
    printed: str


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalRay]:
    """A local Ray as every job starts it, for a user who never ran Ray before."""
    home = tmp_path_factory.mktemp("home")
    errors = home / "errors.txt"
    variables = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with errors.open("w") as stderr:
        child = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            cwd=ROOT,
            env=variables | {"HOME": str(home), "RAY_USAGE_STATS_ENABLED": "0"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
        try:
            assert child.stdout is not None
            line = child.stdout.readline()
            assert line, errors.read_text()
            found = json.loads(line)
            token_file = home / ".ray" / "auth_token"
            yield LocalRay(
                descendants(child.pid),
                Path(found["session"]),
                found["dashboard"],
                token_file.read_text(),
                token_file,
                line + errors.read_text(),
            )
        finally:
            child.communicate(timeout=60)


def test_everything_listens_on_loopback_alone(cluster: LocalRay) -> None:
    sockets = listening(cluster.pids)
    # The head's store of state, the raylet, the dashboard, agents, workers and the driver.
    assert len(sockets) >= 6
    assert [(str(address), port) for address, port in sockets if not address.is_loopback] == []


def test_token_is_the_owners_alone(cluster: LocalRay) -> None:
    assert len(cluster.token) == 64
    assert cluster.token_file.stat().st_mode & 0o777 == 0o600
    assert cluster.token_file.parent.stat().st_mode & 0o777 == 0o700
    assert [file.name for file in cluster.token_file.parent.iterdir()] == ["auth_token"]


def test_token_is_in_no_command_line_log_or_output(cluster: LocalRay) -> None:
    shown = command_lines(cluster.pids)
    assert "raylet" in shown
    assert "gcs_server" in shown
    assert cluster.token not in shown
    assert cluster.token not in cluster.printed
    logs = [file for file in cluster.session.rglob("*") if file.is_file()]
    assert len(logs) > 5
    assert [file for file in logs if cluster.token.encode() in file.read_bytes()] == []


def test_dashboard_and_job_server_ask_for_the_token(cluster: LocalRay) -> None:
    url = f"http://{cluster.dashboard}/api/jobs/"
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(url, timeout=30)
    assert refused.value.code == 401
    refused.value.close()
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {cluster.token}"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert answer.status == 200
