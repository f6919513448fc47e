"""Three nodes on one machine, whose only common storage is a bucket; a node can be killed; a table of what it cost."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import boto3
import psutil
import pytest
import ray
from moto.server import ThreadedMotoServer
from ray.cluster_utils import Cluster

from captioner import storage
from captioner.runtime.cluster import start_ray

BUCKET = "nodes"
# Of one worker node: an encoder or a training worker, and tasks beside it.
CPUS = 2
# Of the table that the summary prints: job, fault, lost rows, repeated rows, seconds without and with the fault.
ROWS: list[tuple[str, ...]] = []


@dataclass
class Nodes:
    """A head without CPUs for work, and two nodes that work."""

    cluster: Cluster
    uri: str
    """Of the bucket."""

    def keys(self, prefix: str) -> list[str]:
        """Objects below a prefix, without it."""
        pages = boto3.client("s3").get_paginator("list_objects_v2")
        found = pages.paginate(Bucket=BUCKET, Prefix=prefix)
        return [
            entry["Key"].removeprefix(prefix)
            for page in found
            for entry in page.get("Contents", [])
        ]

    def kill_node_running(self, name: str) -> None:
        """SIGKILL to a node's raylet, at once and with no warning, where a process named ``ray::<name>...`` lives."""
        for node in self.cluster.worker_nodes:
            raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
            if any(name in process_title(child) for child in raylet.children()):
                os.kill(raylet.pid, signal.SIGKILL)
                self.cluster.remove_node(node, allow_graceful=False)
                return
        raise AssertionError(f"no node runs {name}")

    def run_and_kill(
        self, job: Callable[[], object], moment: Callable[[], bool], name: str, delay: float
    ) -> float:
        """Run a job while a node dies ``delay`` seconds after ``moment`` first holds.

        Returns:
            how long the job took, in seconds. Afterwards there are three nodes again.
        """
        errors: list[BaseException] = []

        def kill() -> None:
            try:
                while not moment():
                    time.sleep(0.02)
                time.sleep(delay)
                self.kill_node_running(name)
            except BaseException as error:  # shown by the test, which waits for this thread
                errors.append(error)

        killer = threading.Thread(target=kill, daemon=True)
        started = time.monotonic()
        killer.start()
        job()
        seconds = time.monotonic() - started
        killer.join(timeout=60)
        assert not killer.is_alive(), "the job ended before its node could be killed"
        assert not errors, errors
        self.add_node()
        return seconds

    def add_node(self) -> None:
        self.cluster.add_node(num_cpus=CPUS, object_store_memory=2 * 10**8)


def process_title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it ended meanwhile
        return ""


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """The nodes have credentials in their environment; where the bucket is they learn from the driver."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name in storage.S3_ADDRESS_VARIABLES:
            patch.delenv(name, raising=False)
        patch.setenv("AWS_ACCESS_KEY_ID", "nobody")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
        head = {"num_cpus": 0, "object_store_memory": 2 * 10**8, "include_dashboard": False}
        found = Nodes(Cluster(initialize_head=True, head_node_args=head), f"s3://{BUCKET}")
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("RAY_ADDRESS", found.cluster.address)
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        try:
            found.add_node()
            found.add_node()
            start_ray()
            yield found
        finally:
            ray.shutdown()
            found.cluster.shutdown()
    server.stop()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The table of benchmarks/README.md."""
    if ROWS:
        terminalreporter.section("nodes lost")
        head = ("job", "fault", "lost rows", "repeated rows", "undisturbed", "with the fault")
        for row in (head, ("---",) * len(head), *ROWS):
            terminalreporter.write_line(f"| {' | '.join(row)} |")
