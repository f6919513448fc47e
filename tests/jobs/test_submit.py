"""``make submit-*`` on a cluster of three nodes, and how a job's end is told."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.head import RAY, ROOT, Head, free_port

pytestmark = pytest.mark.timeout(900)


@contextmanager
def ray_node(head: Head, log: Path) -> Iterator[None]:
    """One more node of two CPUs, as another machine would start it."""
    command = [
        str(RAY), "start", "--block", f"--address={head.address}", "--num-cpus=2",
        "--object-store-memory=200000000", f"--dashboard-agent-listen-port={free_port()}",
    ]  # fmt: skip
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=head.environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def cluster(head: Head, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """The head and two more nodes."""
    folder = tmp_path_factory.mktemp("nodes")
    wait = (
        "import ray, sys, time\n"
        "ray.init(logging_level='ERROR')\n"
        "deadline = time.monotonic() + 120\n"
        "while sum(node['Alive'] for node in ray.nodes()) < int(sys.argv[1]):\n"
        "    assert time.monotonic() < deadline, ray.nodes()\n"
        "    time.sleep(1)\n"
    )
    with ExitStack() as nodes:
        # One after the other: two raylets of one machine that start at once choose the same socket's name.
        for name, count in (("a", "2"), ("b", "3")):
            nodes.enter_context(ray_node(head, folder / f"{name}.log"))
            subprocess.run(
                [str(RAY.with_name("python")), "-c", wait, count],
                env=head.environment | {"RAY_ADDRESS": head.address},
                check=True,
            )
        yield head


def make(
    target: str, arguments: str, variables: dict[str, str]
) -> "subprocess.CompletedProcess[str]":
    """``make TARGET ARGS=...`` from the repository root, with an environment that is taken as installed."""
    return subprocess.run(
        ["make", "-o", ".venv/requirements.installed", target, f"ARGS={arguments}"],
        cwd=ROOT,
        env=variables,
        capture_output=True,
        text=True,
    )


@pytest.mark.long
def test_submitted_extraction_uses_every_node_and_is_followed(
    cluster: Head, tmp_path: Path
) -> None:
    output = tmp_path / "a store"  # arguments keep their spaces
    done = make(
        "submit-extract",
        "--source shapes --source-options.shapes.train 40 --source-options.shapes.validation 4 "
        "--source-options.shapes.test 4 --encoder.weights random --encoder.layer layer3 "
        f"--output '{output}'",
        cluster.environment | {"ADDRESS": cluster.dashboard},
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert json.loads((output / "manifest.json").read_text())["counts"]["ok"] == 48
    shown = done.stdout + done.stderr
    assert "Ray: 8 CPUs, 0 GPUs" in shown  # four of the head's, two of each node's
    assert "48 images" in shown
    assert cluster.environment["RAY_AUTH_TOKEN"] not in shown


def test_failing_job_ends_the_command_with_its_failure(head: Head, tmp_path: Path) -> None:
    done = make(
        "submit-train",
        f"--features {tmp_path}/absent --output {tmp_path}/model",
        head.environment | {"ADDRESS": head.dashboard},
    )
    assert done.returncode != 0
    assert "not a feature store" in done.stdout + done.stderr
    assert not (tmp_path / "model" / "manifest.json").exists()


def test_without_the_token_nothing_is_submitted(head: Head, tmp_path: Path) -> None:
    stranger = {k: v for k, v in head.environment.items() if k != "RAY_AUTH_TOKEN"}
    for token in ({}, {"RAY_AUTH_TOKEN": "0" * 64}):
        done = make(
            "submit-extract",
            f"--source shapes --output {tmp_path}/features",
            stranger | {"HOME": str(tmp_path), "ADDRESS": head.dashboard} | token,
        )
        assert done.returncode != 0
        assert "oken" in done.stdout + done.stderr
        assert not (tmp_path / "features").exists()
