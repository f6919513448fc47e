"""Extraction: a source of images -> a feature store, on Ray Data."""

import logging
import time
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import safetensors.torch

from captioner import storage
from captioner.artifacts.feature_store import ENCODER_WEIGHTS, FeatureStore
from captioner.artifacts.output import Output
from captioner.artifacts.schema import (
    CAPTION_ROWS,
    SPLITS,
    EncoderIdentity,
    SplitCounts,
    StoreManifest,
    feature_rows,
    view_names,
)
from captioner.config import Compute, ExtractConfig
from captioner.encoders.resnet50 import Encoder, identify, load_weights
from captioner.features.pipeline import run_pipeline
from captioner.features.row_marks import finish_rows, forget_checkpoint, list_data_files
from captioner.images.views import other_views
from captioner.runtime.cluster import PoolPlan, num_gpus, plan_pool, start_ray
from captioner.runtime.device import choose_compute, prepare_device
from captioner.sources import open_source
from captioner.sources.base import Source

logger = logging.getLogger(__name__)

_CAPTIONS_PER_FILE = 1_000_000
_REASONS_SHOWN = 5


class EncodeImages:
    """Pipeline stage: images -> ``pooled`` and ``grid`` columns."""

    def __init__(
        self,
        weights_uri: str,
        identity: EncoderIdentity,
        grid: bool,
        mirrored: bool,
        crops: int,
        threads: int,
    ):
        self.encoder = Encoder.load(weights_uri, identity, prepare_device(threads=threads))
        self.grid, self.mirrored, self.crops = grid, mirrored, crops

    def __call__(self, rows: pa.Table, images: np.ndarray[Any, np.dtype[np.uint8]]) -> pa.Table:
        columns = self.encode(images, "")
        ids = rows["image_id"].to_pylist()
        for name, view in other_views(images, ids, mirrored=self.mirrored, crops=self.crops):
            columns |= self.encode(view, name)
        return pa.table(columns)

    def encode(
        self, images: np.ndarray[Any, np.dtype[np.uint8]], suffix: str
    ) -> dict[str, pa.Array]:
        pooled, cells = self.encoder(images, grid=self.grid)
        found = {"pooled": pooled} if cells is None else {"pooled": pooled, "grid": cells}
        return {
            f"{name}{suffix}": pa.FixedShapeTensorArray.from_numpy_ndarray(tensor.cpu().numpy())
            for name, tensor in found.items()
        }


def extract(config: ExtractConfig) -> StoreManifest:
    """Extract every image of ``config.source`` into a feature store at ``config.output``.

    Continues a killed run; leaves a complete store of the same settings alone.

    Raises:
        SourceError: the source is empty or contradicts itself, or too many images were rejected.
        StoreError: the output belongs to another run or cannot be written.
        ModelError: the encoder's weights cannot be had.
        ConfigError: the cluster has too few CPUs.
    """
    source = open_source(config.source, config.source_options, limits=config.limits)
    total = source.num_images()
    tensors = load_weights(config.encoder)
    start_ray()
    pool = plan_pool(total, size=config.num_encoders, cpus_per_actor=config.cpus_per_encoder)
    identity = identify(config.encoder, tensors, compute_on_cluster(config.encoder.compute))
    output = Output(
        config.output,
        {
            "job": "extract_features",
            "encoder": identity.model_dump(mode="json"),
            "source": source.identity().model_dump(mode="json"),
            "grid": config.grid,
            "mirrored": config.mirrored,
            "crops": config.crops,
            "limits": config.limits.model_dump(mode="json"),
        },
    )
    if output.complete:
        logger.info("%s is complete: nothing to do", output.root)
        manifest = FeatureStore.open(output.root).manifest
        logger.info(describe(manifest))
        return manifest
    with output:
        started = time.monotonic()
        storage.write_bytes(output.uri(ENCODER_WEIGHTS), safetensors.torch.save(tensors))
        _write_captions(source, output)
        logger.info(
            "extracting %s images with %s, %s", f"{total:,}", config.encoder.name, _describe(pool)
        )
        run_pipeline(
            source,
            output,
            "features",
            feature_rows(identity.channels, config.grid, view_names(config.mirrored, config.crops)),
            EncodeImages,
            {
                "weights_uri": output.uri(ENCODER_WEIGHTS),
                "identity": identity,
                "grid": config.grid,
                "mirrored": config.mirrored,
                "crops": config.crops,
                "threads": pool.threads,
            },
            limits=config.limits,
            batch_size=config.batch_size,
            pool=pool,
        )
        rows = finish_rows(output, "features", total, config.max_reject_fraction)
        splits = _count(rows, output)
        manifest = StoreManifest(
            encoder=identity,
            source=source.identity(),
            grid=config.grid,
            mirrored=config.mirrored,
            crops=config.crops,
            total=_sum(list(splits.values())),
            splits=splits,
            files=list_data_files(output, "features") + list_data_files(output, "captions"),
        )
        output.publish(manifest.model_dump_json(indent=1))
        forget_checkpoint(output)
    seconds = time.monotonic() - started
    logger.info("%s: published after %.0f s", output.root, seconds)
    logger.info("\n".join([describe(manifest), *_reasons(rows)]))
    return manifest


def describe(manifest: StoreManifest) -> str:
    """What a feature store holds, one line a split."""
    rows = [*manifest.splits.items(), ("total", manifest.total)]
    return "\n".join(
        f"  {name:10} {counts.images:>11,} images  {counts.rejected:>9,} rejected  {counts.captions:>11,} captions"
        for name, counts in rows
    )


def _reasons(rows: pa.Table) -> list[str]:
    """The commonest reasons for rejection, with an image each."""
    rejected = rows.filter(rows["error"].is_valid())
    counted = rejected.group_by("error").aggregate([([], "count_all"), ("image_id", "min")])
    common = counted.sort_by([("count_all", "descending"), ("error", "ascending")])
    return [
        f"  {row['count_all']:,} rejected: {row['error']} ({row['image_id_min']})"
        for row in common.slice(0, _REASONS_SHOWN).to_pylist()
    ]


def compute_on_cluster(requested: Literal["auto"] | Compute) -> Compute:
    """The arithmetic that suits the machines the encoders will run on, which need not be the driver's."""
    if not num_gpus():
        return choose_compute(requested, "cpu")
    probe = ray.remote(num_gpus=1)(choose_compute)
    compute: Compute = ray.get(probe.remote(requested, "cuda"))
    return compute


def _describe(pool: PoolPlan) -> str:
    kind = "GPU" if pool.num_gpus else "CPU"
    threads = "" if pool.num_gpus else f" of {pool.threads} threads"
    return f"{pool.size} {kind} encoder{'s' if pool.size > 1 else ''}{threads}"


def _write_captions(source: Source, output: Output) -> None:
    """Write the captions table: names and contents are the same in every run, so a restart rewrites it safely."""
    batches: list[pa.RecordBatch] = []
    rows = part = 0

    def flush() -> None:
        with storage.atomic_writer(output.uri("captions", f"part-{part:05d}.parquet")) as file:
            pq.write_table(pa.Table.from_batches(batches, CAPTION_ROWS), file)

    for batch in source.captions():
        batches.append(batch)
        rows += len(batch)
        if rows >= _CAPTIONS_PER_FILE:
            flush()
            batches, rows, part = [], 0, part + 1
    flush()


def _count(rows: pa.Table, output: Output) -> dict[str, SplitCounts]:
    captions: dict[str, int] = dict.fromkeys(SPLITS, 0)
    ids = rows.select(["image_id", "split"])
    for file in storage.list_files(output.uri("captions")):
        with storage.open_input(file.uri) as handle:
            table = pq.read_table(handle, columns=["image_id"])
        joined = table.join(ids, "image_id").group_by("split").aggregate([([], "count_all")])
        for row in joined.to_pylist():
            captions[row["split"]] += row["count_all"]
    counted = rows.group_by("split").aggregate([([], "count_all"), ("error", "count")]).to_pylist()
    found = {row["split"]: (row["count_all"], row["error_count"]) for row in counted}
    return {
        split: SplitCounts(
            images=found[split][0],
            ok=found[split][0] - found[split][1],
            rejected=found[split][1],
            captions=captions[split],
        )
        for split in SPLITS
        if split in found
    }


def _sum(counts: list[SplitCounts]) -> SplitCounts:
    names = SplitCounts.model_fields
    return SplitCounts(**{name: sum(getattr(count, name) for count in counts) for name in names})
