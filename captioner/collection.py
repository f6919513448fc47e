"""Captioning of whole collections: any source of images -> a directory of captions, on Ray Data."""

import logging
import time
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from captioner import storage
from captioner.captioning import Captioner
from captioner.cluster import plan_pool, start_ray
from captioner.config import CaptionConfig, DecodeConfig
from captioner.model_store import load_record
from captioner.pipeline import finish_rows, forget_checkpoint, list_data_files, run_pipeline
from captioner.schema import CAPTIONED_ROWS, CaptionsManifest
from captioner.sources import open_source

logger = logging.getLogger(__name__)


class CaptionImages:
    """Pipeline stage: images -> ``caption``, ``log_prob`` and ``alternatives`` columns."""

    def __init__(self, model_uri: str, decode: DecodeConfig, threads: int):
        if not torch.cuda.is_available():
            torch.set_num_threads(threads)
        self.captioner = Captioner.load(model_uri)
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
    """
    source = open_source(config.images, config.source_options, limits=config.limits)
    total = source.num_images()
    model = storage.absolute(config.model)
    record = load_record(model)
    start_ray()
    output = storage.Output(
        config.output,
        {
            "job": "caption",
            "model": record.weights_sha256,
            "source": source.identity().model_dump(mode="json"),
            "decode": config.decode.model_dump(mode="json"),
            "limits": config.limits.model_dump(mode="json"),
        },
    )
    if output.complete:
        logger.info("%s is complete: nothing to do", output.root)
        return CaptionsManifest.model_validate(storage.read_json(output.uri(storage.MANIFEST)))
    with output:
        started = time.monotonic()
        pool = plan_pool(config.num_captioners, config.cpus_per_captioner)
        logger.info("captioning %s images with %s", f"{total:,}", model)
        run_pipeline(
            source,
            output,
            "captions",
            CAPTIONED_ROWS,
            CaptionImages,
            {"model_uri": model, "decode": config.decode, "threads": pool.threads},
            limits=config.limits,
            batch_size=config.batch_size,
            pool=pool,
        )
        rows = finish_rows(output, "captions", total, config.max_reject_fraction)
        rejected = rows["error"].length() - rows["error"].null_count
        manifest = CaptionsManifest(
            model=model,
            weights_sha256=record.weights_sha256,
            decode=config.decode.model_dump(),
            source=source.identity(),
            images=total,
            rejected=rejected,
            files=list_data_files(output, "captions"),
        )
        output.publish(manifest.model_dump_json(indent=1))
        forget_checkpoint(output)
    logger.info(
        "%s: %s images captioned, %s rejected, %.0f s",
        output.root,
        f"{total - rejected:,}",
        f"{rejected:,}",
        time.monotonic() - started,
    )
    return manifest
