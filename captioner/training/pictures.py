"""Pictures of a split, read, loaded and augmented by Ray Data on the CPUs of any node, anew in every pass.

Each worker runs a dataset of its own over its share of the plan that is left: a task for each of its steps, whose rows
arrive in the plan's order. ``streaming_split`` could not say which pictures a step has, nor go on within an epoch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import ray
import torch
from ray.data import ExecutionResources
from ray.exceptions import RayTaskError
from torch import Tensor

from captioner.config import FinetuneConfig
from captioner.encoders.spec import EncoderSpec
from captioner.errors import CaptionerError, SourceError
from captioner.features.picked import load_views, read_picked
from captioner.features.stage import PIXELS, LoadPictures, tensor
from captioner.runtime.cluster import TASK_CPUS, num_cpus
from captioner.runtime.data_context import data_context
from captioner.sources.base import Source
from captioner.sources.tasks import Piece, PieceSource
from captioner.training.data import CaptionData, Columns, Done, Pass
from captioner.training.plan import (
    Indices,
    Plan,
    caption_units,
    epoch_plan,
    first_captions,
    sequential_plan,
)

# Captions that a picture's second coming would cost: it never comes twice in an epoch.
_TWICE = 2**30
# What the loaded pictures that wait for all workers may take of the object store, and of each worker's at least.
_STORE_BYTES, _LEAST_STORE_BYTES = 2**30, 2**27
# Steps that are fetched to this process before they are asked for.
_AHEAD = 2
# Roughly, of an encoded picture.
_PICTURE_BYTES = 2**17


@dataclass
class Pictures:
    """A split's pictures as one worker gets them."""

    data: CaptionData
    image_ids: Sequence[str]
    """In the order of the rows of ``data``."""
    source: "Source | ray.ObjectRef[Source]"
    spec: EncoderSpec
    config: FinetuneConfig
    rank: int
    workers: int

    def units(self) -> Indices:
        """What stays together: all captions of a picture."""
        return caption_units(self.data.image_rows, grouped=True, picture=_TWICE)

    def epoch(self, number: int, done: Sequence[Done] = ()) -> Pass:
        plan = epoch_plan(
            self.units(),
            self.data.lengths,
            self.config.global_batch,
            number,
            self.config.seed,
            self.workers,
        )
        # The steps are the same for any number of workers.
        return self._pass(plan[sum(part.steps for part in done) :], number)

    def ordered(self, *, images: int | None = None) -> Pass:
        units, batch = self.units(), self.config.global_batch
        if images is not None:
            units, batch = first_captions(self.data.image_rows), images
        return self._pass(sequential_plan(units, self.data.lengths, batch, self.workers), None)

    def _pass(self, plan: Plan, epoch: int | None) -> Pass:
        return Pass(self.data, plan, self.rank, lambda images: self._read(images, epoch))

    def _read(self, images: list[Indices], epoch: int | None) -> Iterator[Columns]:
        """Pixels of each batch of images, uint8 [I, rows, columns, 3], as an epoch shows them."""
        steps = [[self.image_ids[row] for row in rows] for rows in images]
        tables = self._tables([names for names in steps if names], epoch)
        held: list[pa.Table] = []
        for names in steps:
            while sum(map(len, held)) < len(names):
                held.append(next(tables))
            some = pa.concat_tables(held) if held else None
            if not names or some is None:
                yield {PIXELS: torch.zeros(0, *self.spec.input_size, 3, dtype=torch.uint8)}
                continue
            if some["image_id"][: len(names)].to_pylist() != names:
                raise SourceError("pictures have come in another order than they were asked for")
            yield {PIXELS: _pixels(some[: len(names)])}
            held = [some[len(names) :]] if len(some) > len(names) else []

    def _tables(self, steps: list[list[str]], epoch: int | None) -> Iterator[pa.Table]:
        """What the tasks give: ``image_id`` and pixels of all steps' images, one after the other."""
        if not steps:
            return
        config, rest = self.config, max(1, self.workers)
        pieces = [
            Piece(
                partial(read_picked, self.source, names, config.retry_seconds),
                len(names),
                len(names) * _PICTURE_BYTES,
            )
            for names in steps
        ]
        with data_context() as context:
            context.raise_original_map_exception = True
            context.execution_options.preserve_order = True
            context.execution_options.resource_limits = ExecutionResources.for_limits(
                cpu=max(1.0, num_cpus() / rest),
                object_store_memory=max(_STORE_BYTES // rest, _LEAST_STORE_BYTES),
            )
            dataset = ray.data.read_datasource(
                PieceSource("Pictures", pieces),
                num_cpus=TASK_CPUS,
                override_num_blocks=len(pieces),
            ).map_batches(
                load_views,
                fn_kwargs={
                    "stage": LoadPictures(self.spec.fit, config.limits, thumbnails=False),
                    "seed": config.seed,
                    "epoch": epoch,
                    "crop": config.crop,
                    "mirror": config.mirror,
                },
                batch_size=None,
                batch_format="pyarrow",
                num_cpus=TASK_CPUS,
            )
        try:
            yield from dataset.iter_batches(
                batch_size=None, batch_format="pyarrow", prefetch_batches=_AHEAD
            )
        except RayTaskError as error:
            if not isinstance(error.cause, CaptionerError):
                raise
            # Ray Data adds lines of advice.
            raise type(error.cause)(str(error.cause).partition("\n")[0]) from error


def _pixels(rows: pa.Table) -> Tensor:
    # Copied, for torch wants memory that it may write, which Ray's object store's is not.
    return torch.from_numpy(np.array(tensor(rows, PIXELS)))
