"""What Ray does not offer in public, and yet is needed: every private name of Ray's that the project uses is in here.

But for ``__serve_build_asgi_app__``, which looks private: it has to be a method of serving/ingress.py's class, and the
docstring of ``serve.ingress`` asks for it where the API is made of a replica's arguments.

Each may be gone in Ray's next release. tests/unit/test_ray_private.py and tests/cluster/test_ray_private.py say what
then no longer holds.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
import ray
from ray._private import ray_constants
from ray._private.authentication.http_token_authentication import get_auth_headers_if_auth_enabled
from ray._private.internal_api import get_memory_info_reply
from ray._private.state import state

if TYPE_CHECKING:  # ray.data takes seconds, which not everyone who starts Ray needs
    from ray.data import DataContext
    from ray.data.checkpoint import CheckpointConfig

# A resource of the head alone: what asks for a little of it is placed there.
HEAD = "node:__internal_head__"
# Ray Train's list of a run's checkpoints, in the run's folder.
CHECKPOINTS = "checkpoint_manager_snapshot.json"
# How the mark of a file ends, in a checkpoint of Ray Data's, until the file is complete.
PENDING = ".pending.parquet"
# Of a Ray that a job starts for itself. Its processes inherit them.
_GCS_PORT = ray_constants.GCS_PORT_ENVIRONMENT_VARIABLE
_LOCAL = {
    # A node may start in so many seconds; where other work holds a laptop's cores, it takes more than Ray's own thirty.
    "RAY_raylet_start_wait_time_s": "180",
    # It would start one more process for every training, and nobody takes this node away.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # How long a thread of torch's looks at a barrier before it sleeps there: by libgomp's default for milliseconds, on
    # cores that another process wants. So many looks are some 50 microseconds. Read when the library is loaded.
    "GOMP_SPINCOUNT": "1000",
}


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """While the block runs, Ray starts or is joined as one that will never have a second node.

    It then stays on 127.0.0.1; on Linux, without this, it replaces that by the machine's own address, on which
    everybody can call it. ``ray.init`` has no parameter for it: what Ray reads is a variable, made for Windows and
    macOS and read when Ray is imported.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        with _environment({ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0"}):
            yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextlib.contextmanager
def local_settings(free_port: int) -> Iterator[None]:
    """While the block runs, a Ray that is started answers on ``free_port`` and tells its processes so.

    They look for a Ray on this machine otherwise, and find the wrong one or two: the one that releases the workers of a
    dead training then takes a running training for dead. ``ray.init`` has no parameter for the port, and once it has
    returned it is too late to tell them. The user's own settings of the port and of the rest come first.
    """
    port = os.environ.get(_GCS_PORT, str(free_port))
    settings = {name: os.environ.get(name, value) for name, value in _LOCAL.items()}
    address = {_GCS_PORT: port, "RAY_ADDRESS": f"127.0.0.1:{port}"}
    with _environment(settings | address):
        yield


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Variables that Ray's processes inherit, and that children of ours which start later must not."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def ask_head(address: str) -> grpc.StatusCode:
    """What a cluster's head answers this process, token and all: OK, UNAUTHENTICATED, or something else where none is.

    ``ray.init`` finds out as well, after minutes, and says so in lines of its own.

    Raises:
        AuthenticationError: this process shall have a token, and has none.
    """
    method = grpc.insecure_channel(address).unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")
    try:
        # A message without fields.
        method(b"", timeout=10, metadata=get_auth_headers_if_auth_enabled({}).items())
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def start_autoscaling_coordinator() -> None:
    """Start the actor that Ray Train asks for its resources, and wait until it answers.

    Train starts it too, but waits five seconds for its first answer and then warns with a traceback, over and over; on
    a busy machine its start alone takes longer.
    """
    # Imported here, for it takes Ray Data with it, which not everyone who starts Ray needs.
    from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
        get_or_create_autoscaling_coordinator,
    )

    ray.get(get_or_create_autoscaling_coordinator().__ray_ready__.remote())


def logs() -> str:
    """The folder of the logs of the session that this process is part of, on this node."""
    node = ray._private.worker._global_node
    assert node is not None
    return str(node.get_logs_dir_path())


@dataclass(frozen=True)
class ObjectStore:
    """The object stores of all nodes together."""

    used: int
    """Bytes held now."""
    spilled: int
    """Bytes written to disk so far."""


def object_store() -> ObjectStore:
    """What the cluster's object stores hold. In public there is only the sum over Prometheus' scrapes."""
    stats = get_memory_info_reply(state).store_stats
    return ObjectStore(stats.object_store_bytes_used, stats.spilled_bytes_total)


@dataclass(frozen=True)
class Steering:
    """What decides, while a dataset is executed, how its work is cut. Called by the thread that schedules it."""

    begins: Callable[[], None]
    """The first task of the model actors was handed out."""
    block_bytes: Callable[[], int]
    """Bytes of the blocks that tasks before the model actors give from now on."""
    is_task_full: Callable[[int], bool]
    """Whether so many rows are enough for the next task of a model actor."""
    is_file_full: Callable[[int], bool]
    """Whether so many rows are enough for the next file."""


def steer(context: "DataContext", steering: Steering) -> None:
    """Let ``steering`` cut the work of the datasets of ``context``: tasks, then one pool of actors, then a write.

    In public there are only numbers that are fixed before the first row is seen: ``batch_size``, ``min_rows_per_file``
    and ``target_max_block_size``.
    """
    # Here, for it is a subclass of what only those who have Ray Data can import.
    from ray.data._internal.execution.bundle_queue.bundler import RebundleQueue, RebundlingStrategy
    from ray.data._internal.execution.execution_callback import ExecutionCallback
    from ray.data._internal.execution.operators.actor_pool_map_operator import ActorPoolMapOperator
    from ray.data._internal.execution.operators.map_operator import MapOperator

    class When(RebundlingStrategy):
        def __init__(self, is_full: Callable[[int], bool]):
            self._is_full = is_full

        def can_build_ready_bundle(self, state):  # type: ignore[no-untyped-def]
            return state.num_rows > 0 and self._is_full(state.num_rows)

        def rows_needed_from_last_pending_bundle(self, total_pending_rows, last_pending_bundle):  # type: ignore[no-untyped-def]
            return last_pending_bundle.num_rows() or 0

    class Callback(ExecutionCallback):
        def before_execution_starts(self, executor):  # type: ignore[no-untyped-def]
            *self._before, self._actors, write = (
                operator for operator in executor._topology if isinstance(operator, MapOperator)
            )
            assert isinstance(self._actors, ActorPoolMapOperator)
            self._actors._block_ref_bundler = RebundleQueue(When(steering.is_task_full))
            write._block_ref_bundler = RebundleQueue(When(steering.is_file_full))
            self._begun = False
            self._cut()

        def on_execution_step(self, executor):  # type: ignore[no-untyped-def]
            if not self._begun and self._actors.num_active_tasks():
                self._begun = True
                steering.begins()
            self._cut()

        def _cut(self) -> None:
            for operator in self._before:
                operator.override_target_max_block_size(steering.block_bytes())

    context.custom_execution_callback_classes = [Callback]


def checkpoint_config(**settings: Any) -> "CheckpointConfig":
    """Row marks as Ray Data keeps them, without its way of going on: an actor that takes a whole CPU and stands behind
    the Read, so that all that is done would be read again. Sources leave it out instead.
    """
    from ray.data.checkpoint import CheckpointConfig
    from ray.data.checkpoint.checkpoint_filter import CheckpointManager

    class NoFilter(CheckpointManager):
        def load_checkpoint(self, *_: Any, **__: Any) -> tuple[None, int]:
            return None, 0

    return CheckpointConfig(**settings, checkpoint_manager_cls=NoFilter)


def latest_checkpoint(listed: bytes) -> str | None:
    """The name of a training's last checkpoint, by Ray Train's list. In public only a ``Result`` tells it, which says
    on the screen that it looks.

    Raises:
        ValueError: it is no such list.
    """
    latest = json.loads(listed)["latest_checkpoint_result"]
    return None if latest is None else str(latest["checkpoint_dir_name"])
