"""Captioning of whole collections: any source of images -> a directory of captions, on Ray Data."""

import logging

from captioner.artifacts.manifests import CaptionsManifest
from captioner.artifacts.model_directory import load_model
from captioner.artifacts.output import WORK, Output, publish_once
from captioner.artifacts.tables import CAPTIONED_ROWS, THUMBNAIL
from captioner.captioning.contact_sheet import write_contact_sheet
from captioner.captioning.exports import check_exports, write_exports
from captioner.captioning.stage import CaptionImages
from captioner.config import CaptionConfig
from captioner.encoders.weights import ENCODER_WEIGHTS
from captioner.features.extract import describe_counts
from captioner.features.pipeline import run_pipeline
from captioner.features.rejects import report_rejects
from captioner.features.row_marks import count_rows, finish_rows, rewrite_repeated
from captioner.runtime.cluster import plan_pool, start_ray
from captioner.sources import open_source
from captioner.sources.beginning import keep_beginning, tell_change
from captioner.sources.outage import patiently

logger = logging.getLogger(__name__)

# What decides the form of what is published.
_OUT = {
    *("format", "sentences", "beside", "copy_pictures"),
    *("contact_sheet", "contact_sheet_images"),
}

CAPTIONS = "captions"


def caption_collection(config: CaptionConfig) -> CaptionsManifest:
    """Caption every image of ``config.images`` into ``config.output``, continuing a killed run.

    Raises:
        SourceError: there are no images, or too many were rejected.
        ModelError: the model directory is unusable.
        StoreError: the output belongs to another run or cannot be written.
        ConfigError: the cluster has too few CPUs, or the model cannot be searched as asked.
        OutOfReachError: images could not be read, or a store or a cluster cannot be had now.
    """
    source = patiently(
        config.retry_seconds,
        lambda: open_source(
            config.images,
            config.source_options,
            limits=config.limits,
            captions=False,
            output=None if config.restart else config.output,
        ),
    )
    check_exports(config, source.identity().kind)
    # All of it, once, before every actor of a cluster finds the same damage.
    model = patiently(config.retry_seconds, lambda: load_model(config.model))
    directory, spec = model.directory, model.record.encoder.spec
    directory.read(ENCODER_WEIGHTS)
    decode = directory.search(config.decode)
    start_ray()
    total = source.num_images()
    pool = plan_pool(total, size=config.num_captioners, cpus_per_actor=config.cpus_per_captioner)

    def fill(output: Output) -> CaptionsManifest:
        keep_beginning(output, source)
        logger.info("captioning %s images with %s", f"{total:,}", directory.uri)
        # What is handed over as one other file is written as tables first, as everything is.
        in_one = config.format in ("jsonl", "csv")
        tables = f"{WORK}/{CAPTIONS}" if in_one else CAPTIONS
        stage = CaptionImages(
            directory.uri,
            spec,
            decode,
            config.limits,
            thumbnails=config.contact_sheet,
            sentences=config.sentences,
            threads=pool.threads,
        )
        schema = CAPTIONED_ROWS
        if config.contact_sheet:
            schema = schema.insert(schema.get_field_index("error"), THUMBNAIL)
        run_pipeline(
            source,
            output,
            tables,
            schema,
            stage,
            batch_size=config.batch_size,
            pool=pool,
            retry_seconds=config.retry_seconds,
            accept_unreadable=config.accept_unreadable,
        )
        rows = finish_rows(output, tables, total)
        counts = count_rows(rows, source.left_out())
        rejects = report_rejects(output, rows.failed, total, config.max_reject_fraction)
        files = rewrite_repeated(output, rows)
        sheet = write_contact_sheet(output, files, config) if config.contact_sheet else []
        exports = write_exports(output, files, config)
        files = exports if in_one else [*files, *exports]
        logger.info(describe_counts(counts))
        return CaptionsManifest(
            model=directory.uri,
            version=directory.version,
            decode=decode,
            source=source.identity(),
            counts=counts,
            files=[*files, *sheet, *rejects],
        )

    identity = {
        "job": "caption",
        "model": directory.version,
        "source": source.identity().claim(),
        "decode": decode.model_dump(mode="json"),
        "limits": config.limits.model_dump(mode="json"),
        **config.model_dump(include=_OUT),
    }
    manifest = publish_once(config.output, identity, CaptionsManifest, fill, restart=config.restart)
    tell_change(manifest.source, source.identity(), config.output)
    return manifest
