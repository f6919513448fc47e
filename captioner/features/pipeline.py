"""The Ray Data job that extraction and captioning share: source -> decode -> model actors -> Parquet, exactly once.

Ray Data's row checkpointing keeps the books: behind every Read it filters the ids whose output files are complete, and
on a restart it deletes files that a killed task left half-done. It needs ids that come out of the Read itself.
"""

import errno
import logging
import math
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import ray
from ray.actor import ActorHandle
from ray.data import ActorPoolStrategy, DataContext, ExecutionResources
from ray.data.checkpoint import CheckpointConfig
from ray.data.extensions import FixedShapeTensorFormat

from captioner import storage
from captioner.artifacts.output import Output
from captioner.config import ImageLimits
from captioner.errors import ImageError, StoreError
from captioner.features.row_marks import CHECKPOINT, count_done, distrust_double_marks, has_pending
from captioner.images.load import load_image
from captioner.runtime.cluster import TASK_CPUS, PoolPlan, num_cpus
from captioner.runtime.data_context import data_context
from captioner.runtime.progress import ProgressLine
from captioner.sources.base import Source

logger = logging.getLogger(__name__)

PIXELS = "pixels"
_IMAGE_SHAPE = (224, 224, 3)
_ACTOR_MEMORY = 3 * 2**29
# What a run may keep in the object store, mostly decoded images that wait. Ray Data's own bound, half of the store,
# lets decoding run thousands of images ahead of the model, which makes nothing faster.
_STORE_BYTES, _STORE_BYTES_PER_GPU, _STORE_BYTES_PER_ACTOR = 2**29, 2**32, 2**27
_FILES = 1000
_FILE_BYTES = 128 * 2**20


class Stage(Protocol):
    """What the model actors run. Built once per actor, from plain arguments."""

    def __call__(self, rows: pa.Table, images: np.ndarray[Any, np.dtype[np.uint8]]) -> pa.Table:
        """Output columns for the good rows of a batch, in their order.

        Args:
            rows: image_id, split, uri of N images.
            images: uint8 RGB [N, 224, 224, 3].
        """
        ...


def load_rows(rows: pa.Table, limits: ImageLimits) -> pa.Table:
    """Replace ``bytes`` by ``pixels``: uint8 [224, 224, 3], zeros where ``error`` says why there are none."""
    images = np.zeros((len(rows), *_IMAGE_SHAPE), np.uint8)
    errors: list[str | None] = rows["error"].to_pylist()
    for position, data in enumerate(rows["bytes"]):
        if errors[position] is None:
            try:
                images[position] = load_image(data.as_buffer().to_pybytes(), limits)
            except ImageError as error:
                errors[position] = str(error)
    return pa.table(
        {
            "image_id": rows["image_id"],
            "split": rows["split"],
            "uri": rows["uri"],
            PIXELS: pa.FixedShapeTensorArray.from_numpy_ndarray(images),
            "error": pa.array(errors, pa.string()),
        }
    )


class _StageActor:
    """Runs a stage on the good rows of each batch and puts the rejected ones back, with nulls, in their places."""

    def __init__(
        self, stage: type[Stage], options: dict[str, Any], schema: pa.Schema, counter: ActorHandle
    ):
        self.stage = stage(**options)
        self.schema = schema
        self.counter = counter

    def __call__(self, rows: pa.Table) -> pa.Table:
        good = rows["error"].is_null()
        count = int(pa.compute.sum(good).as_py() or 0)
        columns = rows.drop_columns([PIXELS])
        if count:
            images = rows[PIXELS].combine_chunks()
            pixels = (
                images.chunk(0) if isinstance(images, pa.ChunkedArray) else images
            ).to_numpy_ndarray()
            mask = good.to_numpy()
            output = self.stage(columns.filter(good), pixels if mask.all() else pixels[mask])
            # Positions of good rows in the output, null for rejected ones: take() then fills in nulls.
            place = pa.array(np.cumsum(mask) - 1, mask=~mask)
            for name in output.column_names:
                columns = columns.append_column(name, _take(output[name], place))
        for field in self.schema:
            if field.name not in columns.column_names:
                columns = columns.append_column(field.name, pa.nulls(len(rows), field.type))
        self.counter.add.remote(len(rows), len(rows) - count)
        return columns.select(self.schema.names).cast(self.schema)


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
    stage: type[Stage],
    options: dict[str, Any],
    *,
    limits: ImageLimits,
    batch_size: int,
    pool: PoolPlan,
    counter: ActorHandle | None = None,
) -> None:
    """Map ``stage`` over every image of ``source`` into ``<output>/<directory>/*.parquet``.

    Continues where a killed run stopped. ``schema`` is that of the files; it must hold ``image_id`` and ``error``.
    ``counter`` is for callers who watch the progress themselves.

    Raises:
        StoreError: the output cannot be written.
    """
    filesystem, path = storage.resolve(output.uri(directory))
    _, checkpoint = storage.resolve(output.uri(CHECKPOINT))
    total = source.num_images()
    distrust_double_marks(output)
    already = count_done(output)
    if already:
        logger.info("continuing: %s of %s images are done", f"{already:,}", f"{total:,}")
    if already == total and not has_pending(output):
        return
    with data_context() as context, ProgressLine(total, already, counter=counter) as progress:
        _configure(context, checkpoint, filesystem, store_bytes(pool))
        images = ray.data.read_datasource(source.images(), num_cpus=TASK_CPUS)
        decoded = images.map_batches(
            load_rows,
            fn_kwargs={"limits": limits},
            batch_size=batch_size,
            batch_format="pyarrow",
            num_cpus=TASK_CPUS,
        )
        done = decoded.map_batches(
            _StageActor,
            fn_constructor_kwargs={
                "stage": stage,
                "options": options,
                "schema": schema,
                "counter": progress.counter,
            },
            compute=ActorPoolStrategy(size=pool.size),
            batch_size=batch_size,
            batch_format="pyarrow",
            num_cpus=pool.num_cpus,
            num_gpus=pool.num_gpus or None,
            # What an actor with the network in it uses.
            memory=_ACTOR_MEMORY,
        )
        try:
            done.write_parquet(
                path,
                filesystem=filesystem,
                min_rows_per_file=rows_per_file(total, schema),
                ray_remote_args={"num_cpus": TASK_CPUS},
            )
        except OSError as error:
            raise StoreError(f"cannot write {output.uri(directory)}: {_reason(error)}") from error


def rows_per_file(total: int, schema: pa.Schema) -> int:
    """How many rows share an output file, at least: a thousandth of all, as far as memory allows.

    So a store of any size has files that can be listed, and what a killed run had not written yet is little of it.
    """
    tensors = [field.type for field in schema if isinstance(field.type, pa.FixedShapeTensorType)]
    row = sum(int(math.prod(kind.shape) * kind.value_type.bit_width // 8) for kind in tensors)
    return max(1, min(total // _FILES, _FILE_BYTES // max(row, 1)))


def store_bytes(pool: PoolPlan) -> int:
    """Bytes of the object store that a pipeline with these actors may use, over all nodes."""
    each = max(_STORE_BYTES_PER_ACTOR, int(_STORE_BYTES_PER_GPU * pool.num_gpus))
    return _STORE_BYTES + pool.size * each


def _configure(
    context: DataContext, checkpoint: str, filesystem: pa.fs.FileSystem, object_store: int
) -> None:
    filesystem.create_dir(checkpoint, recursive=True)
    context.checkpoint_config = CheckpointConfig(
        id_column="image_id",
        checkpoint_path=checkpoint,
        override_filesystem=filesystem,
        # A run killed between its last row and its manifest still needs them.
        delete_checkpoint_on_success=False,
    )
    # By default up to ten filter actors, each with a CPU for good, which on a small machine would be all of them.
    context.checkpoint_config.checkpoint_actor_pool_max_size = max(1, min(10, num_cpus() // 8))
    context.arrow_fixed_shape_tensor_format = FixedShapeTensorFormat.ARROW_NATIVE
    context.execution_options.resource_limits = ExecutionResources.for_limits(
        object_store_memory=object_store
    )


def _reason(error: OSError) -> str:
    if error.errno == errno.ENOSPC or "No space left" in str(error):
        return "no space left on the device"
    return " ".join(str(error).split())[-300:]
