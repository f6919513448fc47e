"""Captioning of whole collections: any source of images -> a directory of captions, on Ray Data."""

import json
import logging
import time
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from captioner import storage
from captioner.artifacts.model_directory import load_model
from captioner.artifacts.output import MANIFEST, Output
from captioner.artifacts.schema import CAPTIONED_ROWS, CaptionsManifest, FileEntry
from captioner.captioning.captioner import Captioner
from captioner.captioning.contact_sheet import write_contact_sheet
from captioner.config import CaptionConfig, DecodeConfig
from captioner.features.pipeline import run_pipeline
from captioner.features.row_marks import finish_rows, forget_checkpoint, list_data_files
from captioner.runtime.cluster import plan_pool, start_ray
from captioner.runtime.device import prepare_device
from captioner.sources import open_source

logger = logging.getLogger(__name__)

CAPTIONS, JSON_LINES = "captions", "captions.jsonl"


class CaptionImages:
    """Pipeline stage: images -> ``caption``, ``log_prob`` and ``alternatives`` columns."""

    def __init__(self, model_uri: str, decode: DecodeConfig, threads: int):
        self.captioner = Captioner.load(model_uri, prepare_device(threads=threads))
        self.decode = decode

    def __call__(self, rows: pa.Table, images: np.ndarray[Any, np.dtype[np.uint8]]) -> pa.Table:
        captions = self.captioner.caption_pixels(images, self.decode)
        return pa.table(
            {
                "caption": [caption.text for caption in captions],
                "log_prob": pa.array([caption.log_prob for caption in captions], pa.float32()),
                "alternatives": pa.array(
                    [
                        [
                            {"caption": other.text, "log_prob": other.log_prob}
                            for other in caption.alternatives
                        ]
                        for caption in captions
                    ],
                    CAPTIONED_ROWS.field("alternatives").type,
                ),
            }
        )


def caption_collection(config: CaptionConfig) -> CaptionsManifest:
    """Caption every image of ``config.images`` into ``config.output``, continuing a killed run.

    Raises:
        SourceError: there are no images, or too many were rejected.
        ModelError: the model directory is unusable.
        StoreError: the output belongs to another run or cannot be written.
        ConfigError: the cluster has too few CPUs.
    """
    source = open_source(config.images, config.source_options, limits=config.limits, captions=False)
    total = source.num_images()
    model = storage.absolute(config.model)
    # All of it, once, before every actor of a cluster finds the same damage.
    record = load_model(model).record
    decode = config.decode.over(record.decode)
    start_ray()
    pool = plan_pool(total, size=config.num_captioners, cpus_per_actor=config.cpus_per_captioner)
    output = Output(
        config.output,
        {
            "job": "caption",
            "model": record.weights_sha256,
            "source": source.identity().model_dump(mode="json"),
            "decode": decode.model_dump(mode="json"),
            "limits": config.limits.model_dump(mode="json"),
            **_extras(config),
        },
    )
    if output.complete:
        logger.info("%s is complete: nothing to do", output.root)
        return CaptionsManifest.model_validate(storage.read_json(output.uri(MANIFEST)))
    with output:
        started = time.monotonic()
        logger.info("captioning %s images with %s", f"{total:,}", model)
        run_pipeline(
            source,
            output,
            CAPTIONS,
            CAPTIONED_ROWS,
            CaptionImages,
            {"model_uri": model, "decode": decode, "threads": pool.threads},
            limits=config.limits,
            batch_size=config.batch_size,
            pool=pool,
        )
        rows = finish_rows(output, CAPTIONS, total, config.max_reject_fraction)
        rejected = rows["error"].length() - rows["error"].null_count
        files = list_data_files(output, CAPTIONS)
        if config.contact_sheet:
            write_contact_sheet(output, files, rows, config)
        if config.format == "jsonl":
            files = [_write_json_lines(output, files)]
        manifest = CaptionsManifest(
            model=model,
            weights_sha256=record.weights_sha256,
            decode=decode.model_dump(),
            source=source.identity(),
            images=total,
            rejected=rejected,
            files=files,
        )
        output.publish(manifest.model_dump_json(indent=1))
        forget_checkpoint(output)
        if config.format == "jsonl":
            filesystem, path = storage.resolve(output.uri(CAPTIONS))
            filesystem.delete_dir(path)
    logger.info(
        "%s: %s images captioned, %s rejected, %.0f s",
        output.root,
        f"{total - rejected:,}",
        f"{rejected:,}",
        time.monotonic() - started,
    )
    return manifest


def _extras(config: CaptionConfig) -> dict[str, Any]:
    """What of the output's form is not the default; only that is part of the claim, which older ones lack."""
    asked: dict[str, Any] = {}
    if config.format != "parquet":
        asked["format"] = config.format
    if config.contact_sheet:
        asked["contact_sheet_images"] = config.contact_sheet_images
    return asked


def _write_json_lines(output: Output, files: list[FileEntry]) -> FileEntry:
    """All rows as one file of JSON objects, in the order of the Parquet files."""
    count = 0
    with storage.atomic_writer(output.uri(JSON_LINES)) as target:
        for entry in files:
            with storage.open_input(output.uri(entry.path)) as handle:
                for batch in pq.ParquetFile(handle).iter_batches(1024):
                    for row in batch.to_pylist():
                        target.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
                        count += 1
    return FileEntry(path=JSON_LINES, rows=count)
