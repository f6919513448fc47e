"""A hundred faults in the lives of the jobs: ``python -m tests.nodes.soak --rounds 80``.

Every round runs one job's command on three nodes that share a bucket, strikes it once or twice at random moments, and
gives the same command again until it has published. The exit status is 1 where a row is lost or repeated, a result is
another than the undisturbed one, or a command does not come to its end in five goes. Rounds are seeded by their
number; those in the CSV file are not run again.
"""

import argparse
import csv
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from captioner.artifacts import lease
from captioner.errors import CaptionerError
from captioner.runtime import command_line
from tests.cluster import store_fuzz
from tests.cluster.store_fuzz import JOBS, World
from tests.head import ROOT
from tests.nodes.cluster import BUCKET, Nodes
from tests.s3 import CREDENTIALS, Fault, clients_of, run_server

# On a machine of two cores a training takes half a minute to begin.
_PATIENCE, _GOES = 400, 5
ACTORS = ("MapWorker", "RayTrainWorker", "_StageActor")


@dataclass
class Ground:
    """Where the jobs run."""

    nodes: Nodes
    world: World
    seconds: dict[str, float]
    """By job, how long an undisturbed run takes."""


def kill_process(matches: Callable[[str], bool]) -> bool:
    """SIGKILL to one process of ours whose command line matches; whether there was one."""
    for child in psutil.Process().children(recursive=True):
        try:
            if matches(" ".join(child.cmdline())):
                child.kill()
                return True
        except psutil.Error:
            continue
    return False


def strike_driver(ground: Ground, driver: "subprocess.Popen[bytes]") -> None:
    driver.kill()


def strike_driver_gently(ground: Ground, driver: "subprocess.Popen[bytes]") -> None:
    driver.send_signal(signal.SIGTERM)


def strike_actor(ground: Ground, driver: "subprocess.Popen[bytes]") -> None:
    kill_process(lambda line: line.startswith("ray::") and any(name in line for name in ACTORS))


def strike_loader(ground: Ground, driver: "subprocess.Popen[bytes]") -> None:
    kill_process(lambda line: "captioner.images.fence" in line)


def strike_node(ground: Ground, driver: "subprocess.Popen[bytes]") -> None:
    node = ground.nodes.cluster.worker_nodes.copy().pop()
    os.kill(node.all_processes["raylet"][0].process.pid, signal.SIGKILL)
    ground.nodes.cluster.remove_node(node, allow_graceful=False)
    ground.nodes.add_node()


def strike_store(ground: Ground, driver: "subprocess.Popen[bytes]") -> None:
    with ground.world.server.failing(Fault(503, "SlowDown")):
        time.sleep(4)


def strike_with_second(ground: Ground, driver: "subprocess.Popen[bytes]") -> None:
    subprocess.run(driver.args, cwd=ROOT, capture_output=True, timeout=_PATIENCE)


def fill_disk(ground: Ground, driver: "subprocess.Popen[bytes]") -> None:
    """It is too small from the beginning: see ``small_disk``."""


STRIKES: dict[str, Callable[[Ground, "subprocess.Popen[bytes]"], None]] = {
    "driver killed": strike_driver,
    "driver terminated": strike_driver_gently,
    "actor killed": strike_actor,
    "loading process killed": strike_loader,
    "node killed": strike_node,
    "store away for 4 s": strike_store,
    "second driver": strike_with_second,
    **({"disk full": fill_disk} if os.geteuid() == 0 else {}),
}


@contextmanager
def small_disk(folder: Path, generator: random.Random) -> Iterator[Path]:
    """A file system that the job fills, until it is made larger."""
    disk = folder / "disk"
    disk.mkdir(exist_ok=True)
    size = generator.randrange(
        100, 40_000
    )  # KiB; the largest output, with an encoder in it, has 36,000
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", disk], check=True)
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


@contextmanager
def ground(folder: Path) -> Iterator[Ground]:
    """Three nodes, a bucket, and what the jobs read."""
    with run_server() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in CREDENTIALS.items():
            patch.setenv(name, value)
        head = {"num_cpus": 0, "object_store_memory": 2 * 10**8, "include_dashboard": False}
        nodes = Nodes(Cluster(initialize_head=True, head_node_args=head), f"s3://{BUCKET}")
        patch.setenv("RAY_ADDRESS", nodes.cluster.address)
        with clients_of(server, BUCKET):
            try:
                nodes.add_node()
                nodes.add_node()
                world = World(folder, server, nodes.uri)
                store_fuzz.furnish(world.folder, pictures=120)
                yield Ground(nodes, world, {})
            finally:
                ray.shutdown()
                nodes.cluster.shutdown()


def start(job: str, config: Any) -> "subprocess.Popen[bytes]":
    program = "import sys; from tests.nodes.soak import drive; drive(*sys.argv[1:])"
    return subprocess.Popen(
        [sys.executable, "-c", program, job, config.model_dump_json()],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def drive(job: str, config: str) -> None:
    """What a job's command does, in a child process."""
    sys.argv = [job]
    kind = type(World(Path(), None, "").config(job, "unused"))  # type: ignore[arg-type]
    command_line.take_signals()
    lease.BEAT, lease.LOOK, lease.STALE = 2, 1, 10
    try:
        JOBS[job](kind.model_validate_json(config))
    except CaptionerError as error:
        command_line.fail(str(error), error.status)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def expected(ground: Ground, job: str) -> dict[str, Any]:
    """What an undisturbed run publishes."""
    if (job, "s3") not in ground.world.expected:
        config = ground.world.config(job, f"{ground.nodes.uri}/undisturbed-{job}")
        started = time.monotonic()
        driver = start(job, config)
        errors = driver.communicate(timeout=_PATIENCE)[1].decode()
        assert driver.returncode == 0, errors[-3000:]
        ground.seconds[job] = time.monotonic() - started
        ground.world.expected[job, "s3"] = store_fuzz.published(config.output), 0
    return ground.world.expected[job, "s3"][0]


def run_round(ground: Ground, number: int) -> dict[str, Any]:
    """One round, as a row of the table."""
    generator = random.Random(number)
    job = ("extract", "caption-jsonl", "train", "extract", "caption", "tune")[number % 6]
    expected(ground, job)
    strikes = generator.sample(sorted(STRIKES), k=generator.choice((1, 1, 2)))
    moments = [generator.uniform(0, ground.seconds[job]) for _ in strikes]
    with ExitStack() as stack:
        uri = f"{ground.nodes.uri}/round-{number}"
        if "disk full" in strikes:
            uri = f"{stack.enter_context(small_disk(ground.world.folder, generator))}/out"
        return _strike(ground, number, job, uri, dict(zip(strikes, moments, strict=True)))


def _strike(
    ground: Ground, number: int, job: str, uri: str, strikes: dict[str, float]
) -> dict[str, Any]:
    whole = expected(ground, job)
    config = ground.world.config(job, uri)
    started = time.monotonic()
    statuses: list[int] = []
    last = ""
    while len(statuses) < _GOES and 0 not in statuses:
        driver = start(job, config)
        timers = []
        if not statuses:
            for strike, moment in strikes.items():
                timers.append(threading.Timer(moment, STRIKES[strike], (ground, driver)))
                timers[-1].start()
        try:
            last = driver.communicate(timeout=_PATIENCE)[1].decode()
        except subprocess.TimeoutExpired:
            driver.kill()
            last = driver.communicate()[1].decode() + "\nit came to no end"
        statuses.append(driver.returncode)
        for timer in timers:
            timer.cancel()
            timer.join()
        if "disk full" in strikes:
            subprocess.run(["mount", "-o", "remount,size=1g", Path(uri).parent], check=True)
    found = store_fuzz.published(config.output) if 0 in statuses else {}
    rows = [found.get(name, []) for name in ("features", "captions", "captions.jsonl")]
    wanted = [whole.get(name, []) for name in ("features", "captions", "captions.jsonl")]
    return {
        "round": number,
        "job": job,
        "faults": " + ".join(strikes),
        "moments": " ".join(f"{moment:.1f}" for moment in strikes.values()),
        "statuses": " ".join(map(str, statuses)),
        "lost": sum(len(set(a) - set(b)) for a, b in zip(wanted, rows, strict=True)),
        "repeated": sum(len(b) - len(set(b)) for b in rows),
        "differs": " ".join(store_fuzz.differing(found, whole)),
        "seconds": f"{time.monotonic() - started:.0f}",
        "undisturbed": f"{ground.seconds[job]:.0f}",
        "said": "" if 0 in statuses else " ".join(last.split())[-300:],
    }


def is_sound(row: dict[str, Any]) -> bool:
    return (str(row["lost"]), str(row["repeated"]), row["differs"]) == ("0", "0", "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=80)
    parser.add_argument("--csv", type=Path, default=Path("benchmarks/results/soak.csv"))
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    if options.csv.exists():
        with options.csv.open(newline="") as file:
            rows = list(csv.DictReader(file))
    done = {int(row["round"]) for row in rows}
    missing = [number for number in range(options.rounds) if number not in done]
    with tempfile.TemporaryDirectory() as folder, ground(Path(folder)) as found:
        for number in missing:
            row = run_round(found, number)
            rows.append(row)
            new = not options.csv.exists()
            with options.csv.open("a", newline="") as file:
                writer = csv.DictWriter(file, row)
                if new:
                    writer.writeheader()
                writer.writerow(row)
            print(*row.values(), sep="  ", flush=True)
    bad = [row for row in rows if not is_sound(row)]
    faults = sum(len(row["faults"].split(" + ")) for row in rows)
    print(f"{len(rows)} rounds, {faults} faults, {len(bad)} rounds that did not end as undisturbed")
    raise SystemExit(bool(bad))


if __name__ == "__main__":
    main()
