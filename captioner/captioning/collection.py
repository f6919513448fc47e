"""Captioning of whole collections: any source of images -> a directory of captions, on Ray Data."""

import logging
from dataclasses import replace
from typing import Any

from captioner import storage
from captioner.artifacts.collection import Tables
from captioner.artifacts.manifests import CaptionsManifest, Part, open_manifest
from captioner.artifacts.output import Output, differences, publish_once
from captioner.artifacts.tables import CAPTIONED_ROWS, THUMBNAIL
from captioner.captioning.captioner import load_whole
from captioner.captioning.contact_sheet import write_contact_sheet
from captioner.captioning.exports import check_exports, write_exports
from captioner.captioning.stage import CaptionImages
from captioner.config import CaptionConfig
from captioner.errors import StoreError
from captioner.features.extract import describe_counts
from captioner.features.growth import plan_growth
from captioner.features.pipeline import run_pipeline
from captioner.features.rejects import report_rejects
from captioner.features.row_marks import count_rows, finish_rows, rewrite_repeated, write_removed
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
    base = None if config.extends is None else _open_base(config.extends)
    check_exports(config, [source.identity(), *(base.sources if base else ())])
    # All of it, once, before every actor of a cluster finds the same damage.
    model = patiently(config.retry_seconds, lambda: load_whole(config.model))
    decode = model.search(config.decode)
    growth, total = None, source.num_images()
    if base is not None:
        growth = plan_growth(
            base,
            source,
            look_at_all=config.source_options.digest,
            accept_gone=config.accept_gone,
        )
        total = growth.source.num_images()
    pool = None
    if total:
        start_ray()
        pool = plan_pool(
            total,
            size=config.num_captioners,
            cpus_per_actor=config.cpus_per_captioner,
            memory=model.memory,
        )

    def fill(output: Output) -> CaptionsManifest:
        keep_beginning(output, source)
        if pool is not None:
            logger.info("captioning %s images with %s", f"{total:,}", model.uri)
            stage = CaptionImages(
                model.uri,
                model.fit,
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
                source if growth is None else growth.source,
                output,
                CAPTIONS,
                schema,
                stage,
                batch_size=config.batch_size,
                pool=pool,
                retry_seconds=config.retry_seconds,
                accept_unreadable=config.accept_unreadable,
                unchanged=growth.unchanged if growth else None,
            )
        rows = finish_rows(output, CAPTIONS, total)
        # Whatever reads Parquet reads captions.
        rows = replace(rows, files=rewrite_repeated(output, rows), repeated={})
        left_out = source.left_out()
        parts: dict[str, Part] = {}
        if growth is not None:
            rows, parts, left_out = growth.finish(rows, output)
        counts = count_rows(rows, left_out)
        rejects = report_rejects(output, rows.failed, len(rows), config.max_reject_fraction)
        logger.info(describe_counts(counts))
        manifest = CaptionsManifest(
            model=model.uri,
            version=model.version,
            decode=decode,
            sentences=config.sentences,
            source=source.identity(),
            counts=counts,
            files=rows.files,
            parts=parts,
            removed=write_removed(output, rows),
        )
        found = Tables(output.root, manifest, CAPTIONS)
        sheet = write_contact_sheet(output, found, config) if config.contact_sheet else []
        exports = write_exports(output, found, config)
        listed = [*rows.files, *exports, *sheet, *rejects]
        return manifest.model_copy(update={"files": listed})

    identity = {
        "job": "caption",
        "model": model.version,
        "source": source.identity().claim(),
        "decode": decode.model_dump(mode="json"),
        "limits": config.limits.model_dump(mode="json"),
        **config.model_dump(include=_OUT),
        **(growth.identity if growth else {}),
    }
    if base is not None:
        _check_alike(base, identity)
    manifest = publish_once(config.output, identity, CaptionsManifest, fill, restart=config.restart)
    tell_change(manifest.source, source.identity(), config.output)
    return manifest


def _open_base(uri: str) -> Tables:
    """The captions that are extended.

    Raises:
        StoreError: there are none.
    """
    uri = storage.absolute(uri)
    return Tables(uri, open_manifest(uri, CaptionsManifest), CAPTIONS)


def _check_alike(base: Tables, identity: dict[str, Any]) -> None:
    """
    Raises:
        StoreError: the captions that are extended are another model's, or were searched for or written in another way.
    """
    assert isinstance(base.manifest, CaptionsManifest)
    there = {
        "model": base.manifest.version,
        "decode": base.manifest.decode.model_dump(mode="json"),
        "sentences": base.manifest.sentences,
    }
    if different := differences(there, {name: identity[name] for name in there}):
        raise StoreError(f"{base.uri} was captioned otherwise: {'; '.join(different)}")
