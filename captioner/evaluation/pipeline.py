"""The scoring pass on Ray Data: features of a split -> captions, attention and teacher-forced sums."""

import logging
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from ray.actor import ActorHandle
from ray.data import ActorPoolStrategy

from captioner.artifacts.feature_store import Chunk, FeatureStore
from captioner.artifacts.model_directory import ModelDirectory
from captioner.captioning.captioner import DecoderCaptioner
from captioner.config import DecodeConfig
from captioner.decoders.base import Features
from captioner.errors import ModelError
from captioner.evaluation.scoring import SCORED, score_features
from captioner.features.pace import Portions
from captioner.runtime.cluster import plan_pool
from captioner.runtime.data_context import data_context
from captioner.runtime.device import prepare_device
from captioner.runtime.progress import ProgressLine
from captioner.sources.tasks import BYTES_PER_PIECE, Piece, PieceSource

logger = logging.getLogger(__name__)

# Batches of each actor at least: the last ones are then not long waited for.
_BATCHES = 16
SCORED_ROWS = pa.schema([pa.field("image_id", pa.string()), *SCORED])


class ScoreImages:
    """Ray Data actor: features of a batch of images -> ``SCORED_ROWS``."""

    def __init__(
        self,
        model_uri: str,
        decode: DecodeConfig,
        captions: "ray.ObjectRef[dict[str, list[str]]]",
        drawn: frozenset[str],
        threads: int,
        counter: ActorHandle,
    ):
        """
        Args:
            captions: raw references of every image, by id.
            drawn: ids of the images whose attention is returned.
        """
        counter.start.remote()
        self.captioner = DecoderCaptioner.open(model_uri, prepare_device(threads=threads))
        self.decode = decode
        self.captions: dict[str, list[str]] = ray.get(captions)
        self.drawn = drawn
        self.counter = counter
        self.portions = Portions()

    def __call__(self, batch: dict[str, np.ndarray[Any, Any]]) -> pa.Table:
        parts = self.portions.cut(len(batch["image_id"]))
        return pa.concat_tables(
            self._score({name: values[part] for name, values in batch.items()}) for part in parts
        )

    def _score(self, batch: dict[str, np.ndarray[Any, Any]]) -> pa.Table:
        # An image without captions cannot be scored.
        there = [name in self.captions for name in batch["image_id"]]
        names = batch["image_id"][there].tolist()
        if not names:
            return SCORED_ROWS.empty_table()
        features: Features = {
            name: torch.from_numpy(batch[name][there]).float()
            for name in self.captioner.model.decoder.columns
        }
        rows = score_features(
            self.captioner,
            features,
            [self.captions[name] for name in names],
            [name in self.drawn for name in names],
            self.decode,
        )
        # Waited for, a millisecond, so that the last line counts every image.
        ray.get(self.counter.add.remote(len(names), 0))
        return rows.add_column(0, SCORED_ROWS.field(0), pa.array(names, pa.string()))


def score_split(
    store: FeatureStore,
    split: str,
    captions: dict[str, list[str]],
    model: ModelDirectory,
    decode: DecodeConfig,
    *,
    drawn: frozenset[str],
    batch_size: int,
) -> pa.Table:
    """Caption and score every image of a split that has captions.

    Args:
        captions: raw references by image id.
        drawn: ids of the images whose attention is wanted.
        batch_size: images at most.

    Returns:
        ``SCORED_ROWS``, sorted by image id.

    Raises:
        ModelError: an image was lost, or the model is unusable.
    """
    pool = plan_pool(len(captions))
    batch_size = min(batch_size, -(-len(captions) // (_BATCHES * pool.size)))
    logger.info("captioning %s images of split %s", f"{len(captions):,}", split)
    with data_context(), ProgressLine(len(captions), actors=pool.size) as progress:
        dataset = (
            ray.data.read_datasource(_features(store, split, model.record.columns))
            # A read task's rows are one block, which one actor would get whole.
            .repartition(target_num_rows_per_block=batch_size)
            .map_batches(
                ScoreImages,
                fn_constructor_kwargs={
                    "model_uri": model.uri,
                    "decode": decode,
                    "captions": ray.put(captions),
                    "drawn": drawn,
                    "threads": pool.threads,
                    "counter": progress.counter,
                },
                compute=ActorPoolStrategy(size=pool.size),
                batch_size=batch_size,
                num_cpus=pool.num_cpus,
                num_gpus=pool.num_gpus or None,
            )
        )
        blocks = ray.get(dataset.to_arrow_refs())
    rows = pa.concat_tables([block for block in blocks if len(block)]).sort_by("image_id")
    if rows["image_id"].to_pylist() != sorted(captions):
        raise ModelError(
            f"{store.uri}: {len(captions)} images have captions in split {split!r}, "
            f"{len(rows)} were scored"
        )
    return rows


def _features(store: FeatureStore, split: str, columns: Sequence[str]) -> PieceSource:
    """A split of a store for Ray Data: image_id and feature columns of its good images."""
    size = sum(map(store.column_bytes, columns))
    return PieceSource(
        "Features",
        [
            Piece(partial(_read, chunk, columns), len(chunk.rows), len(chunk.rows) * size)
            for chunk in store.chunks(split, max(1, BYTES_PER_PIECE // size))
        ],
    )


def _read(chunk: Chunk, columns: Sequence[str]) -> Iterator[pa.Table]:
    found = chunk.read(("image_id", *columns))
    tensors = {name: pa.FixedShapeTensorArray.from_numpy_ndarray(found[name]) for name in columns}
    yield pa.table({"image_id": pa.array(found["image_id"], pa.string()), **tensors})
