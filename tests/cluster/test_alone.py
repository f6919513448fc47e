"""A local Ray as every job starts it: what it shows to others, nothing; how large it is; and which of two is whose."""

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
import ray
from ray.util.state import get_actor

from captioner.runtime import cluster as runtime
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
            env=variables
            | {name: os.environ[name] for name in ("RAY_USAGE_STATS_ENABLED", "RAY_TMPDIR")}
            | {"HOME": str(home)},
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


@pytest.fixture(scope="module")
def second(cluster: LocalRay) -> Iterator[None]:
    """A Ray of a job of this process, beside the first, on a machine of one core."""
    ray.shutdown()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setattr(runtime, "num_cores", lambda: 1)
        runtime.start_ray()
        yield
    ray.shutdown()


@pytest.mark.usefixtures("second")
def test_a_machine_of_one_core_gets_two_logical_cpus() -> None:
    assert runtime.num_cpus() == 2
    # Actors for both, and yet room for a task and for Ray Data's filter.
    pool = runtime.plan_pool(7_000)
    assert (pool.size, pool.num_gpus, pool.threads) == (2, 0, 1)
    few = runtime.plan_pool(200)
    assert (few.size, few.threads) == (1, 2)
    asked = runtime.plan_pool(200, size=3, cpus_per_actor=2)
    assert (asked.size, asked.threads) == (3, 2)
    assert pool.size * pool.num_cpus + runtime.TASK_CPUS + 1 <= 2.001


@pytest.mark.usefixtures("second")
def test_processes_of_a_local_ray_know_which_ray_is_theirs() -> None:
    """Ray Train's cleaner asks for the state of an actor; beside another Ray it must not ask that one, nor give up."""

    @ray.remote
    class Asker:
        def state_of_itself(self) -> str:
            found = get_actor(ray.get_runtime_context().get_actor_id(), timeout=30)
            return "unknown" if found is None else found.state

    assert ray.get(Asker.remote().state_of_itself.remote()) == "ALIVE"


def test_a_process_outlives_the_ray_that_it_shuts_down() -> None:
    program = (
        "import time, ray; from captioner.runtime.cluster import start_ray;"
        "start_ray(); ray.shutdown(); time.sleep(3); print('alive')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr
