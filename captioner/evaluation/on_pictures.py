"""The scoring pass over pictures: a source's images of a split -> captions and teacher-forced sums, exactly once."""

import io
import json
import logging

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from captioner import storage
from captioner.artifacts.manifests import FileEntry
from captioner.artifacts.models import Model
from captioner.artifacts.output import WORK, Output
from captioner.artifacts.tables import SOURCE_ROWS, THUMBNAIL
from captioner.config import DecodeConfig, EvaluateConfig
from captioner.evaluation.scoring import SCORED
from captioner.evaluation.stage import ScorePictures
from captioner.features.pipeline import run_pipeline
from captioner.features.rejects import report_rejects
from captioner.features.row_marks import finish_rows, rewrite_repeated
from captioner.runtime.cluster import plan_pool
from captioner.sources.base import Source
from captioner.sources.captioned import Captions

logger = logging.getLogger(__name__)

_ROWS, _REFERENCES = f"{WORK}/scored", "references.json"


def score_pictures(
    source: Source,
    captions: Captions,
    output: Output,
    model: Model,
    decode: DecodeConfig,
    config: EvaluateConfig,
    drawn: frozenset[str],
) -> tuple[pa.Table, list[FileEntry]]:
    """Caption and score every image of a source; a killed run is continued.

    Args:
        captions: raw references of each of its images.
        drawn: ids of the images whose attention is wanted.

    Returns:
        image_id, thumbnail and ``SCORED`` of the images that could be loaded, sorted by id; and the file that lists
        those that could not.

    Raises:
        SourceError: too many images were rejected.
        OutOfReachError: images could not be read, or a store or a cluster cannot be had now.
    """
    total = source.num_images()
    pool = plan_pool(total, memory=model.memory)
    logger.info("captioning %s pictures of split %s", f"{total:,}", config.split)
    references = output.work(_REFERENCES)
    storage.write_bytes(references, json.dumps(captions).encode())
    stage = ScorePictures(
        model.uri,
        model.fit,
        decode,
        config.limits,
        references=references,
        drawn=drawn,
        threads=pool.threads,
    )
    run_pipeline(
        source,
        output,
        _ROWS,
        pa.schema([field for field in SOURCE_ROWS if field.name != "bytes"] + [THUMBNAIL, *SCORED]),
        stage,
        batch_size=config.batch_size,
        pool=pool,
        retry_seconds=config.retry_seconds,
        accept_unreadable=config.accept_unreadable,
    )
    found = finish_rows(output, _ROWS, total)
    rejects = report_rejects(output, found.failed, len(found), config.max_reject_fraction)
    tables = [
        pq.read_table(io.BytesIO(storage.read_bytes(entry.uri(output.root))))
        for entry in rewrite_repeated(output, found)
    ]
    rows = pa.concat_tables(tables)
    rows = rows.filter(pc.is_null(rows["error"])).sort_by("image_id")
    return rows.select(["image_id", THUMBNAIL.name, *SCORED.names]), rejects
