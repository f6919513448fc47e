"""The Ray Data job that extraction and captioning share: source -> load -> model actors -> Parquet, exactly once.

Ray Data's row checkpointing keeps the books: before it writes a file it leaves a pending mark with the file's ids, and
renames it once the file is complete. A run that continues deletes files whose marks are pending, and reads, loads and
encodes what no other mark names.
"""

import contextlib
import logging
import math

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.actor import ActorHandle
from ray.data import ActorPoolStrategy, DataContext, ExecutionResources
from ray.data.extensions import FixedShapeTensorFormat
from ray.exceptions import RayTaskError

from captioner import storage
from captioner.artifacts.id_set import IdSet
from captioner.artifacts.output import Output
from captioner.artifacts.tables import UNCHANGED
from captioner.errors import CaptionerError
from captioner.features.loading import load_rows
from captioner.features.pace import MOST_ROWS, Pace, Portions
from captioner.features.row_marks import CHECKPOINT, count_done, discard_unfinished, finished
from captioner.features.stage import Stage
from captioner.features.unreadable import (
    UNREADABLE,
    discard_unreadable,
    set_aside,
    settle_unreadable,
)
from captioner.runtime.cluster import TASK_CPUS, WRITE_CPUS, PoolPlan
from captioner.runtime.data_context import data_context
from captioner.runtime.progress import ProgressLine
from captioner.runtime.ray_private import Steering, checkpoint_config, steer
from captioner.sources.base import Source
from captioner.sources.outage import RETRY_SECONDS, patiently
from captioner.storage.faults import told

logger = logging.getLogger(__name__)

_ACTOR_MEMORY = 3 * 2**29
# What a run may keep in the object store, mostly loaded pictures that wait. Ray Data's own bound, half of the store,
# lets loading run thousands of images ahead of the model, which makes nothing faster.
_STORE_BYTES, _STORE_BYTES_PER_GPU, _STORE_BYTES_PER_ACTOR = 2**29, 2**32, 2**27
# Of a file at most, so that it fits in memory: of all rows, and bytes.
_FILE_SHARE, _FILE_BYTES = 0.01, 128 * 2**20


class _StageActor:
    """Runs a stage on the good rows of each batch and puts the rejected ones back, with nulls, in their places. Those
    that could not be read get no row: nothing marks them as done.
    """

    def __init__(
        self,
        stage: Stage,
        schema: pa.Schema,
        counter: ActorHandle,
        aside: str,
        retry_seconds: float,
    ):
        counter.start.remote()
        patiently(retry_seconds, stage.prepare)
        self.stage, self.schema, self.counter = stage, schema, counter
        self.aside, self.retry_seconds = aside, retry_seconds
        self.portions = Portions()

    def __call__(self, rows: pa.Table) -> pa.Table:
        rows = set_aside(rows, self.aside, self.retry_seconds)
        good = rows["error"].is_null()
        count = int(pc.sum(good).as_py() or 0)
        loaded = [name for name in self.stage.loaded.names if name not in self.schema.names]
        columns = rows.drop_columns(loaded)
        rejected = pc.sum(pc.not_equal(rows["error_kind"], UNCHANGED)).as_py() or 0
        if count < len(rows):
            self.counter.add.remote(len(rows) - count, rejected)
        if count:
            batch = rows.select(["image_id", *self.stage.loaded.names])
            output = self._run(batch if count == len(rows) else batch.filter(good))
            mask = good.to_numpy()
            # Positions of good rows in the output, null for rejected ones: take() then fills in nulls.
            place = pa.array(np.cumsum(mask) - 1, mask=~mask)
            for name in output.column_names:
                columns = columns.append_column(name, _take(output[name], place))
        for field in self.schema:
            if field.name not in columns.column_names:
                columns = columns.append_column(field.name, pa.nulls(len(rows), field.type))
        return columns.select(self.schema.names).cast(self.schema)

    def _run(self, batch: pa.Table) -> pa.Table:
        outputs = []
        for part in self.portions.cut(len(batch)):
            outputs.append(self.stage(batch.slice(part.start, part.stop - part.start)))
            self.counter.add.remote(len(outputs[-1]), 0)
        return pa.concat_tables(outputs)


def _take(column: pa.ChunkedArray, place: pa.Array) -> pa.Array:
    array = column.combine_chunks()
    array = array.chunk(0) if isinstance(array, pa.ChunkedArray) else array
    if isinstance(array, pa.ExtensionArray):
        return pa.ExtensionArray.from_storage(array.type, array.storage.take(place))
    return array.take(place)


def run_pipeline(
    source: Source,
    output: Output,
    directory: str,
    schema: pa.Schema,
    stage: Stage,
    *,
    batch_size: int,
    pool: PoolPlan,
    retry_seconds: float = RETRY_SECONDS,
    accept_unreadable: bool = False,
    unchanged: IdSet | None = None,
    counter: ActorHandle | None = None,
) -> None:
    """Map ``stage`` over every image of ``source`` into ``<output>/<directory>/*.parquet``.

    Continues where a killed run stopped.

    Args:
        schema: of the files; it must hold ``image_id`` and ``error``.
        retry_seconds: how long a task waits while the source is out of reach.
        accept_unreadable: give images that could not be read rows with an error, at the end.
        unchanged: images and contents (``content_key``) that a collection has already: they get rows that say so.
        counter: for callers who watch the progress themselves.

    Raises:
        StoreError: the output cannot be written, or a store denies access.
        OutOfReachError: images could not be read, or the output is out of reach.
    """
    filesystem, path = storage.resolve(output.uri(directory))
    _, checkpoint = storage.resolve(output.work(CHECKPOINT))
    total = source.num_images()
    discard_unfinished(output, directory)
    discard_unreadable(output, directory)
    done = finished(output)
    already = len(done)
    if already:
        logger.info("continuing: %s of %s images are done", f"{already:,}", f"{total:,}")
    if already == total:
        return
    with (
        data_context() as context,
        ProgressLine(total, already, counter=counter, actors=pool.size) as progress,
    ):
        _configure(context, checkpoint, filesystem, store_bytes(pool))
        of_a_file = rows_per_file(total, schema)
        # What a task gives is never cut for two files.
        most = max(MOST_ROWS, min(batch_size, of_a_file))
        pace = Pace(pool.size, of_a_file, most_rows=most)
        _steer(context, pace, stage, batch_size)
        images = ray.data.read_datasource(
            source.images(done, retry_seconds=retry_seconds), num_cpus=TASK_CPUS
        )
        loaded = images.map_batches(
            load_rows,
            fn_kwargs={
                "stage": stage,
                "digests": "sha256" in schema.names,
                "unchanged": None if unchanged is None else ray.put(unchanged),
            },
            batch_size=batch_size,
            batch_format="pyarrow",
            num_cpus=TASK_CPUS,
        )
        rows = loaded.map_batches(
            _StageActor,
            fn_constructor_kwargs={
                "stage": stage,
                "schema": schema,
                "counter": progress.counter,
                "aside": output.work(UNREADABLE),
                "retry_seconds": retry_seconds,
            },
            compute=ActorPoolStrategy(
                size=pool.size,
                max_concurrent_calls_per_actor=stage.calls_on_gpu if pool.num_gpus else 1,
                enable_true_multi_threading=True,
            ),
            batch_size=batch_size,
            batch_format="pyarrow",
            num_cpus=pool.num_cpus,
            num_gpus=pool.num_gpus or None,
            # What an actor with the network in it uses.
            memory=_ACTOR_MEMORY,
        )
        try:
            rows.write_parquet(
                path,
                filesystem=filesystem,
                write_page_checksum=True,
                ray_remote_args={"num_cpus": WRITE_CPUS},
            )
        except (RayTaskError, OSError) as error:
            if (ours := _told(error, output.uri(directory))) is None:
                raise
            raise ours from error
        except KeyboardInterrupt:
            # A store that is away makes it no less interrupted.
            with contextlib.suppress(CaptionerError):
                kept = f"{count_done(output):,}"
                logger.info("%s of %s images are done and kept", kept, f"{total:,}")
            raise
    settle_unreadable(output, directory, schema, total, accept=accept_unreadable)


def rows_per_file(total: int, schema: pa.Schema) -> int:
    """How many rows share an output file at most: a hundredth of all, as far as memory allows."""
    return max(1, min(int(total * _FILE_SHARE), _FILE_BYTES // max(_row_bytes(schema), 1)))


def _row_bytes(schema: pa.Schema) -> int:
    """Bytes of a row's tensors."""
    tensors = [field.type for field in schema if isinstance(field.type, pa.FixedShapeTensorType)]
    return sum(int(math.prod(kind.shape) * kind.value_type.bit_width // 8) for kind in tensors)


def _steer(context: DataContext, pace: Pace, stage: Stage, batch_size: int) -> None:
    """Cut what is loaded, encoded and written at a time by how fast it turns out to go."""
    row = max(_row_bytes(stage.loaded), 1)
    steering = Steering(
        begins=pace.started,
        block_bytes=lambda: pace.rows_per_task * row,
        is_task_full=lambda rows: rows >= min(pace.rows_per_task, batch_size),
        is_file_full=pace.is_file_full,
    )
    steer(context, steering)


def store_bytes(pool: PoolPlan) -> int:
    """Bytes of the object store that a pipeline with these actors may use, over all nodes."""
    each = max(_STORE_BYTES_PER_ACTOR, int(_STORE_BYTES_PER_GPU * pool.num_gpus))
    return _STORE_BYTES + pool.size * each


def _configure(
    context: DataContext, checkpoint: str, filesystem: pa.fs.FileSystem, object_store: int
) -> None:
    filesystem.create_dir(checkpoint, recursive=True)
    context.checkpoint_config = checkpoint_config(
        id_column="image_id",
        checkpoint_path=checkpoint,
        override_filesystem=filesystem,
        # A run killed between its last row and its manifest still needs them.
        delete_checkpoint_on_success=False,
    )
    # So that an error of ours arrives as what it is.
    context.raise_original_map_exception = True
    context.arrow_fixed_shape_tensor_format = FixedShapeTensorFormat.ARROW_NATIVE
    context.execution_options.resource_limits = ExecutionResources.for_limits(
        object_store_memory=object_store
    )


def _told(error: Exception, uri: str) -> CaptionerError | None:
    """What ended a run, where it is an error of ours from a task, or one of the file system that is written to."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, CaptionerError):
        # Ray Data adds lines of advice.
        return type(cause)(str(cause).partition("\n")[0])
    return told("write", uri, cause) if isinstance(cause, OSError) else None
