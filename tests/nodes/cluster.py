"""Three nodes on one machine, whose only common storage is a bucket; a node can be killed."""

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import boto3
import psutil
import pytest
from ray.cluster_utils import Cluster

from captioner import storage
from captioner.artifacts.output import WORK
from captioner.features.row_marks import CHECKPOINT
from tests import odd

BUCKET = "nodes"
FOLDER = odd.NAME
# Of one worker node: an encoder or a training worker, and tasks beside it.
CPUS = 2


@dataclass
class Nodes:
    """A head without CPUs for work, and two nodes that work."""

    cluster: Cluster
    uri: str
    """Of a folder in the bucket."""

    def keys(self, prefix: str) -> list[str]:
        """Objects below a prefix in the folder, without it."""
        prefix = f"{FOLDER}/{prefix}"
        pages = boto3.client("s3").get_paginator("list_objects_v2")
        found = pages.paginate(Bucket=BUCKET, Prefix=prefix)
        return [
            entry["Key"].removeprefix(prefix)
            for page in found
            for entry in page.get("Contents", [])
        ]

    def finished_files(self, output: str) -> int:
        """Of an unfinished run of Ray Data."""
        marks = self.keys(f"{output}/{WORK}/{CHECKPOINT}/")
        return len([key for key in marks if key and ".pending" not in key])

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
                    time.sleep(0.1)  # each look is work for the bucket, in this process
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
        """One more; where the bucket is it has to learn from the driver."""
        with pytest.MonkeyPatch.context() as patch:
            for name in storage.S3_ADDRESS_VARIABLES:
                patch.delenv(name, raising=False)
            self.cluster.add_node(num_cpus=CPUS, object_store_memory=2 * 10**8)


def process_title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it ended meanwhile
        return ""
