"""Extraction: a source of images -> a feature store, on Ray Data."""

import io
import logging
from typing import Literal, get_args

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import safetensors.torch

from captioner import storage
from captioner.artifacts.collection import Tables
from captioner.artifacts.feature_store import FeatureStore
from captioner.artifacts.manifests import (
    MANIFEST,
    Counts,
    EncoderRecord,
    FileEntry,
    Part,
    SplitCounts,
    StoreManifest,
)
from captioner.artifacts.output import CLAIM, Output, differences, publish_once
from captioner.artifacts.tables import CAPTION_ROWS, SPLITS, feature_rows
from captioner.config import Compute, EncoderConfig, ExtractConfig, Runtime
from captioner.encoders.family import family_of
from captioner.encoders.weights import ENCODER_WEIGHTS
from captioner.errors import StoreError
from captioner.features.encode import EncodeImages
from captioner.features.growth import plan_growth
from captioner.features.leaks import tell_leaks
from captioner.features.pipeline import run_pipeline
from captioner.features.rejects import report_rejects
from captioner.features.row_marks import Rows, count_done, count_rows, finish_rows, write_removed
from captioner.features.runtime import choose_runtime
from captioner.images.views import view_names
from captioner.runtime.cluster import PoolPlan, num_gpus, plan_pool, start_ray
from captioner.runtime.device import choose_compute
from captioner.sources import open_source
from captioner.sources.base import Source
from captioner.sources.beginning import keep_beginning, tell_change
from captioner.sources.outage import patiently

logger = logging.getLogger(__name__)

# What else the rows hold, beside the vectors of the image itself.
_VIEWS = ("grid", "mirrored", "crops", "thumbnails")
_CAPTIONS_PER_FILE, _CAPTIONS_PER_BATCH = 250_000, 50_000


def extract(config: ExtractConfig) -> StoreManifest:
    """Extract every image of ``config.source`` into a feature store at ``config.output``.

    Continues a killed run, with the images, the arithmetic and the settings that it began with and today's captions;
    leaves a complete store of the same settings alone.

    Raises:
        SourceError: the source is empty or contradicts itself, or too many images were rejected.
        StoreError: the output belongs to another run or cannot be written.
        ModelError: the encoder's weights cannot be had.
        ConfigError: there is no such encoder, or the cluster has too few CPUs.
        OutOfReachError: images could not be read, or a store or a cluster cannot be had now.
    """
    base = None if config.extends is None else FeatureStore.open(config.extends)
    if base is not None:
        config = _settings_of(base, config)
    source = patiently(
        config.retry_seconds,
        lambda: open_source(
            config.source,
            config.source_options,
            limits=config.limits,
            output=None if config.restart else config.output,
        ),
    )
    encoder, tensors = _choose_encoder(config, base)
    spec = encoder.spec
    growth, total = None, source.num_images()
    if base is not None:
        growth = plan_growth(
            Tables(base.uri, base.manifest, "features"),
            source,
            look_at_all=config.source_options.digest,
            accept_gone=config.accept_gone,
        )
        total = growth.source.num_images()
    pool = None
    if total:
        start_ray()
        pool = plan_pool(total, size=config.num_encoders, cpus_per_actor=config.cpus_per_encoder)

    def fill(output: Output) -> StoreManifest:
        keep_beginning(output, source)
        weights = (
            output.write(ENCODER_WEIGHTS, tensors) if base is None else base.encoder_weights_entry
        )
        captions = write_captions(source, output)
        runtime = config.runtime if config.runtime != "auto" else "eager"
        if pool is not None:
            if config.runtime == "auto":
                left = total - count_done(output)
                at = weights.uri(output.root)
                runtime = choose_runtime(at, spec, left, pool, config.retry_seconds)
            logger.info(
                "extracting %s images with %s, %s",
                f"{total:,}",
                spec.title,
                _describe(pool, runtime),
            )
            stage = EncodeImages(
                weights.uri(output.root),
                spec,
                config.limits,
                grid=config.grid,
                mirrored=config.mirrored,
                crops=config.crops,
                thumbnails=config.thumbnails,
                threads=pool.threads,
                runtime=runtime,
            )
            schema = feature_rows(
                spec.shape,
                grid=config.grid,
                views=view_names(config.mirrored, config.crops),
                thumbnails=config.thumbnails,
            )
            run_pipeline(
                source if growth is None else growth.source,
                output,
                "features",
                schema,
                stage,
                batch_size=config.batch_size or pool.batch_size,
                pool=pool,
                retry_seconds=config.retry_seconds,
                accept_unreadable=config.accept_unreadable,
                unchanged=growth.unchanged if growth else None,
            )
        rows = finish_rows(output, "features", total)
        left_out = source.left_out()
        parts: dict[str, Part] = {}
        if growth is not None:
            rows, parts, left_out = growth.finish(rows, output)
            captions = growth.captions(captions)
        counts = count_rows(rows, left_out)
        rejects = report_rejects(output, rows.failed, len(rows), config.max_reject_fraction)
        return StoreManifest(
            encoder=encoder.model_copy(update={"runtime": runtime}),
            source=source.identity(),
            grid=config.grid,
            mirrored=config.mirrored,
            crops=config.crops,
            thumbnails=config.thumbnails,
            counts=counts,
            splits=count_splits(rows, output, captions),
            files=[weights, *rows.files, *captions, *rejects],
            parts=parts,
            removed=write_removed(output, rows),
        )

    identity = {
        "job": "extract_features",
        "encoder": spec.model_dump(mode="json"),
        "source": source.identity().claim(),
        "limits": config.limits.model_dump(mode="json"),
        **config.model_dump(include=set(_VIEWS)),
        **(growth.identity if growth else {}),
    }
    manifest = publish_once(config.output, identity, StoreManifest, fill, restart=config.restart)
    tell_change(manifest.source, source.identity(), config.output)
    logger.info(describe(manifest))
    tell_leaks(FeatureStore.open(config.output), *manifest.splits)
    return manifest


def _settings_of(base: FeatureStore, config: ExtractConfig) -> ExtractConfig:
    """The settings with those of the store that is extended in the place of defaults.

    Raises:
        StoreError: others are asked for.
    """
    there = {name: getattr(base.manifest, name) for name in _VIEWS}
    for name, value in there.items():
        asked = getattr(config, name)
        if asked not in (value, ExtractConfig.model_fields[name].default):
            raise StoreError(
                f"{base.uri} was made with {name} {value}, and so is what extends it, not with {asked}"
            )
    return config.model_copy(update=there)


def _choose_encoder(
    config: ExtractConfig, base: FeatureStore | None
) -> tuple[EncoderRecord, bytes]:
    """The encoder and the content of its file of weights.

    Raises:
        StoreError: the store that is extended has another.
        ModelError: the weights cannot be had.
    """
    if base is not None and config.encoder == EncoderConfig():
        return base.manifest.encoder, base.read_encoder_weights()
    family, _ = family_of(config.encoder.name)
    tensors, weights = family.weights(config.encoder)
    start_ray()
    compute = _begun_with(config.output, restart=config.restart)
    if config.encoder.compute != "auto" or compute is None:
        compute = compute_on_cluster(config.encoder.compute)
    spec = family.spec(config.encoder, tensors, compute)
    if base is not None:
        there = base.manifest.encoder.spec.model_dump(mode="json")
        if different := differences(there, spec.model_dump(mode="json")):
            raise StoreError(f"{base.uri} has another encoder: {'; '.join(different)}")
    return EncoderRecord(spec=spec, weights=weights), safetensors.torch.save(tensors)


def describe(manifest: StoreManifest) -> str:
    """What a feature store holds: one line a split, then what became of every file found."""
    lines = [
        f"  {name:10} {counts.images:>11,} images  {counts.captions:>11,} captions"
        for name, counts in manifest.splits.items()
    ]
    return "\n".join([*lines, f"  {describe_counts(manifest.counts)}"])


def describe_counts(counts: Counts) -> str:
    """In one line; together the files found."""
    parts = [f"{counts.ok:,} fine", f"{counts.rejected:,} rejected"]
    if counts.unreadable:
        parts.append(f"{counts.unreadable:,} unreadable")
    if counts.left_out:
        kinds = ", ".join(describe_kind(kind, number) for kind, number in counts.left_out.items())
        parts.append(f"left out: {kinds}")
    return f"{counts.found:,} found: {', '.join(parts)}"


def describe_kind(kind: str, number: int) -> str:
    """``3 .pdf``, ``2 broken links``."""
    plural = number > 1 and kind.endswith((" file", " folder", " link", " picture"))
    return f"{number:,} {kind}{'s' if plural else ''}"


def compute_on_cluster(requested: Literal["auto"] | Compute) -> Compute:
    """The arithmetic that suits the machines the encoders will run on, which need not be the driver's."""
    if not num_gpus():
        return choose_compute(requested, "cpu")
    probe = ray.remote(num_gpus=1)(choose_compute)
    compute: Compute = ray.get(probe.remote(requested, "cuda"))
    return compute


def _begun_with(output: str, *, restart: bool) -> Compute | None:
    """The arithmetic of the run that began in ``output``, which it keeps on whatever machine it goes on; None where
    none did, or where it is to begin anew, which what is published never does."""
    if restart and not storage.exists(storage.join(output, MANIFEST)):
        return None
    claim = storage.join(output, CLAIM)
    found = storage.read_json(claim) if storage.exists(claim) else None
    encoder = found.get("encoder") if isinstance(found, dict) else None
    precision = encoder.get("precision") if isinstance(encoder, dict) else None
    return precision if precision in get_args(Compute) else None


def _describe(pool: PoolPlan, runtime: Runtime) -> str:
    kind = f"{'compiled ' if runtime == 'compiled' else ''}{'GPU' if pool.num_gpus else 'CPU'}"
    threads = "" if pool.num_gpus else f" of {pool.threads} threads"
    return f"{pool.size} {kind} encoder{'s' if pool.size > 1 else ''}{threads}"


def write_captions(source: Source, output: Output) -> list[FileEntry]:
    """Write the captions table: names and contents are the same in every run, so a restart rewrites it safely."""
    batches: list[pa.RecordBatch] = []
    entries: list[FileEntry] = []
    rows = 0

    def flush() -> None:
        file = io.BytesIO()
        pq.write_table(pa.Table.from_batches(batches, CAPTION_ROWS), file, write_page_checksum=True)
        entry = output.write(f"captions/part-{len(entries):05d}.parquet", file.getvalue())
        entries.append(entry.model_copy(update={"rows": sum(map(len, batches))}))

    for batch in source.captions():
        batches.append(batch)
        rows += len(batch)
        if rows >= _CAPTIONS_PER_FILE:
            flush()
            batches, rows = [], 0
    flush()
    return entries


def count_splits(rows: Rows, output: Output, files: list[FileEntry]) -> dict[str, SplitCounts]:
    """Good images of every split, and their captions."""
    images, captions = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)
    for file in files:
        place = file.uri(output.root)
        with storage.reading(place), storage.open_input(place) as handle:
            for batch in pq.ParquetFile(handle).iter_batches(_CAPTIONS_PER_BATCH):
                table = pa.table(batch)
                # The rows of an image follow each other, over the end of a batch or of a file.
                ids = table["image_id"].combine_chunks().dictionary_encode()
                good = pa.array(rows.good.holds(ids.dictionary.to_pylist()))
                table = table.filter(good.take(ids.indices))
                first = table.filter(pc.equal(pc.fill_null(table["index"], 0), 0))
                for found, part in (
                    (images, first),
                    (captions, table.filter(table["caption"].is_valid())),
                ):
                    for count in part.group_by("split").aggregate([([], "count_all")]).to_pylist():
                        found[count["split"]] += count["count_all"]
    return {
        split: SplitCounts(images=images[split], captions=captions[split])
        for split in SPLITS
        if images[split]
    }
