"""Starts Ray or joins the cluster that a job was submitted to."""

import contextlib
import logging
import os
import re
import secrets
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import ray
from ray.exceptions import AuthenticationError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from captioner.errors import ConfigError, OutOfReachError
from captioner.runtime import ray_private
from captioner.runtime.device import num_cores
from captioner.runtime.lifeline import Lifeline
from captioner.runtime.screen import SCREEN
from captioner.storage import S3_ADDRESS_VARIABLES

logger = logging.getLogger(__name__)

# Logical CPUs of a task that reads and loads, of a model actor, and of a task that writes. Whatever nodes are lost,
# those that stay must have room for the tasks beside all actors, restarted there: actors that held whole CPUs would
# leave none, and the job would wait for ever. So actors take next to nothing, yet something, which keeps them off heads
# without CPUs. Writing takes as little: Ray Data serves the first of its operators first, and would write nothing
# before the last picture is loaded where loading can have all CPUs.
TASK_CPUS = 0.99
ACTOR_CPUS = WRITE_CPUS = 0.0002
# Of a Ray that is started here: one for the trial of a search or the driver of a job beside one for its tasks.
LOCAL_CPUS = 2
# Below that, another model actor costs more in starting than it gives.
_LEAST_IMAGES = 256


def start_ray() -> None:
    """Join the cluster named by ``RAY_ADDRESS`` (set by ``ray job submit``), else start a local one.

    Workers on a joined cluster get the driver's address of S3. They do not get its credentials: a runtime environment
    is shown on the dashboard and in logs, so nodes have their own, by role, variable or ``~/.aws/credentials``.

    From then on the process ends, with one line and status 75, when that Ray dies.

    Raises:
        ConfigError: ``RAY_ADDRESS`` is no address, or the cluster wants another token.
        OutOfReachError: no cluster answers there.
    """
    if ray.is_initialized():
        return
    SCREEN.hide_others()
    SCREEN.wait_for("starting Ray")
    # A job's Ray says what it has to say in its log; that of a notebook says it there.
    options: dict[str, Any] = {"log_to_driver": not SCREEN.quiet}
    if address := os.environ.get("RAY_ADDRESS"):
        found = {name: os.environ[name] for name in S3_ADDRESS_VARIABLES if os.environ.get(name)}
        # Ray would refuse what the submitted job's runtime environment sets, too, although it is where we have it from.
        os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")
        _knock(address)
        alone = ray_private.alone() if _on_loopback_alone(address) else contextlib.nullcontext()
        try:
            with alone, _own_end():
                ray.init(runtime_env={"env_vars": found}, **options)
        except ConnectionError as error:  # "auto", where none runs; or it ends just now
            raise OutOfReachError(
                f"no Ray answers at {address}, which RAY_ADDRESS names: start it, correct or unset the variable"
            ) from error
        lifeline = Lifeline(ray.get_runtime_context().get_node_id())
    else:
        lifeline = Lifeline()
        start_local_ray(**options)
    lifeline.joined()
    SCREEN.keep_log(ray_private.logs())
    SCREEN.pass_by("", last=True)
    resources = ray.cluster_resources()
    logger.info(
        "Ray: %d CPUs, %d GPUs%s",
        resources.get("CPU", 0),
        resources.get("GPU", 0),
        f"; its log: {SCREEN.log}" if SCREEN.log else "",
    )


def start_local_ray(**options: Any) -> None:
    """Start Ray on this machine, listening on 127.0.0.1 alone, behind Ray's token.

    It never attaches to an unrelated cluster that happens to run here.

    Args:
        options: passed on to ``ray.init``; by default a logical CPU for each core, but two at least.
    """
    options.setdefault("num_cpus", max(LOCAL_CPUS, num_cores()))
    if os.environ.get("RAY_AUTH_MODE", "token") == "token":
        _create_token()
    with ray_private.alone(), ray_private.local_settings(_free_port()), _own_end():
        ray.init(address="local", dashboard_host="127.0.0.1", **options)


@contextlib.contextmanager
def _own_end() -> Iterator[None]:
    """Keeps a job's handler of SIGTERM; ``ray.init`` puts one in its place that ends with status 15."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    if callable(handler) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _knock(address: str) -> None:
    if address == "auto":  # of what runs on this machine
        return
    if not re.fullmatch(r"[^/]+:\d+", address):
        raise ConfigError(f"RAY_ADDRESS: {address!r} is not the host:port of a Ray head")
    try:
        answer = ray_private.ask_head(address)
    except AuthenticationError:  # RAY_AUTH_MODE=token, and no token
        answer = grpc.StatusCode.UNAUTHENTICATED
    if answer == grpc.StatusCode.UNAUTHENTICATED:
        raise ConfigError(
            f"the Ray cluster at {address} asks for its token: set RAY_AUTH_MODE=token, and have its token in "
            "RAY_AUTH_TOKEN or ~/.ray/auth_token"
        )
    if answer != grpc.StatusCode.OK:
        raise OutOfReachError(
            f"no Ray answers at {address}, which RAY_ADDRESS names: start it, correct or unset the variable"
        )


def _on_loopback_alone(address: str) -> bool:
    """Whether an address is of a Ray that ``start_local_ray`` started: it answers on loopback, and nowhere else."""
    host, _, port = address.rpartition(":")
    if host not in ("127.0.0.1", "localhost") or not port.isdigit():
        return False
    try:
        with socket.create_connection((ray.util.get_node_ip_address(), int(port)), timeout=2):
            return False
    except OSError:
        return True


def _create_token() -> None:
    """Create Ray's token file for its owner alone; Ray would leave its mode to the umask."""
    if {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        return
    path = Path.home() / ".ray" / "auth_token"
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent) as file:  # mode 0600
        file.write(secrets.token_hex(32))
        file.flush()
        with contextlib.suppress(FileExistsError):
            os.link(file.name, path)
    path.chmod(0o600)


def num_gpus() -> int:
    """GPUs of the whole cluster."""
    return int(ray.cluster_resources().get("GPU", 0))


def num_cpus() -> int:
    """Logical CPUs of the whole cluster."""
    return int(ray.cluster_resources().get("CPU", 0))


def worker_slots(gpus_per_worker: float = 1.0) -> int:
    """Training workers that the cluster has room for: with GPUs as many as each GPU has such shares, else one a CPU.

    A GPU's rest is not another's: of 0.4 of a GPU each two GPUs hold four workers, not five.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not num_gpus():
        return sum(int(node.get("CPU", 0)) for node in nodes)
    each = int(1 / gpus_per_worker + 1e-6)
    return sum(min(int(node.get("GPU", 0)) * each, int(node.get("CPU", 0))) for node in nodes)


def driver_resource() -> str:
    """The resource of the driver's node alone: what asks for a little of it is placed there."""
    own = ray.get_runtime_context().get_node_id()
    (node,) = (node for node in ray.nodes() if node["NodeID"] == own)
    is_head = ray_private.HEAD in node["Resources"]
    return ray_private.HEAD if is_head else f"node:{node['NodeManagerAddress']}"


def beside_driver() -> NodeAffinitySchedulingStrategy:
    """Where an actor lives that only serves the driver: no other node's loss should take it."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)


@dataclass(frozen=True)
class PoolPlan:
    """A pool of model actors: how many, and what each takes."""

    size: int
    num_gpus: float
    threads: int
    """Threads of one actor's tensor library. Ray would set one."""
    num_cpus: float = ACTOR_CPUS

    @property
    def batch_size(self) -> int:
        """Pictures of a batch, where none is asked for: with fewer a GPU is not busy."""
        return 256 if self.num_gpus else 32


def plan_pool(
    images: int,
    *,
    size: int | None = None,
    cpus_per_actor: int | None = None,
    memory: int | None = None,
) -> PoolPlan:
    """Model actors for the cluster as it stands: one per GPU, else CPU actors that cover each node's cores.

    On CPU they share the cores with loading, which needs few: the system does that better than a reservation, and Ray
    Data starts no more loading than the model keeps up with. An actor of several threads waits at the end of every
    operation for the one that loading has delayed (2 threads on 2 cores: a fifth slower than 2 actors of one), but
    each actor holds the network once more; so four actors a node, and more only where they have four cores each.

    Args:
        images: how many there are to do; few get few actors.
        size: number of actors, to override the plan.
        cpus_per_actor: threads of one actor on CPU, to override the plan.
        memory: bytes that an actor on CPU takes; there are no more, but one, than the cluster has room for.

    Raises:
        ConfigError: the cluster has too few CPUs for a pipeline.
    """
    if not num_cpus():
        raise ConfigError(
            "the Ray cluster has no logical CPU, and a pipeline needs one (ray start --num-cpus=1; an autoscaling "
            "cluster must keep a worker up)"
        )
    most = max(1, -(-images // _LEAST_IMAGES))
    if memory is not None and not num_gpus():
        most = min(most, max(1, int(ray.cluster_resources().get("memory", 0)) // memory))
    if gpus := num_gpus():
        return PoolPlan(size or min(gpus, most), num_gpus=1, threads=1)
    nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    actors = {cpus: _actors_per_node(cpus, cpus_per_actor) for cpus in nodes if cpus}
    largest = max(actors)
    planned = size or min(sum(actors[cpus] for cpus in nodes if cpus), most)
    threads = cpus_per_actor or -(-largest // min(actors[largest], planned))
    return PoolPlan(planned, num_gpus=0, threads=threads)


def _actors_per_node(cpus: int, cpus_per_actor: int | None) -> int:
    if cpus_per_actor is not None:
        return max(1, round(cpus / cpus_per_actor))
    return max(min(cpus, 4), cpus // 4)
