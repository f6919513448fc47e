"""Finetuning: a trained model and pictures in, a model directory with an encoder of its own out."""

import hashlib
import io
import json
import logging
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import safetensors.torch
from ray.train import UserCallback

from captioner import storage
from captioner.artifacts.manifests import EncoderRecord, FileEntry, ModelManifest
from captioner.artifacts.model_directory import LoadedModel, load_model, pack_weights, save_model
from captioner.artifacts.model_hub import PREFIX
from captioner.artifacts.output import WORK, Output
from captioner.artifacts.tables import SOURCE_ROWS
from captioner.config import FinetuneConfig, Split
from captioner.encoders.spec import EncoderSpec
from captioner.encoders.weights import ENCODER_WEIGHTS
from captioner.errors import SourceError
from captioner.features.pipeline import run_pipeline
from captioner.features.rejects import report_rejects
from captioner.features.row_marks import Rows, finish_rows
from captioner.features.stage import CheckPictures
from captioner.runtime.cluster import PoolPlan, start_ray
from captioner.sources import open_source
from captioner.sources.base import Source
from captioner.sources.beginning import keep_beginning
from captioner.sources.captioned import Captions, captioned
from captioner.sources.outage import patiently
from captioner.training.checkpoints import Learnt
from captioner.training.finetune_worker import build, finetune_worker
from captioner.training.fit import Work, learn
from captioner.training.publish import write_history
from captioner.training.run import NO_MATTER, TrainResult, publish_trained

logger = logging.getLogger(__name__)

_CHECKED = f"{WORK}/pictures"
_CHECK_BATCH = 32
_SPLITS: tuple[Split, Split] = ("train", "validation")
_CAPTIONS = pa.schema(
    [
        ("split", pa.string()),
        ("image_id", pa.string()),
        ("captions", pa.list_(pa.string())),
    ]
)
# How often pictures are tried, and where they and the model lie, changes nothing of what is learnt.
_NO_MATTER = {
    *NO_MATTER,
    "model",
    "source",
    "source_options",
    "retry_seconds",
    "accept_unreadable",
    "max_reject_fraction",
}


def run_finetuning(config: FinetuneConfig, callbacks: Sequence[UserCallback] = ()) -> TrainResult:
    """Let decoder and encoder of a model go on learning on pictures; publish the weights of the best epoch as a model
    with its own encoder.

    Continues a killed run from its last checkpoint; leaves a complete model of the same settings alone.

    Raises:
        ModelError: the model cannot be read.
        SourceError: the source has no captions in splits train and validation, or too many pictures were rejected.
        StoreError: the output belongs to another run or cannot be written.
        ConfigError: the encoder has fewer stages, or the cluster is too small for ``num_workers``.
        TrainingError: the loss stopped being finite.
        OutOfReachError: pictures could not be read, or a store or a cluster cannot be had now.
    """
    model = patiently(config.retry_seconds, lambda: load_model(config.model))
    encoder_entry = model.directory.entry(ENCODER_WEIGHTS)
    model.directory.read(ENCODER_WEIGHTS)
    network = build(model, config.stages)
    source = patiently(
        config.retry_seconds,
        lambda: open_source(
            config.source,
            config.source_options,
            limits=config.limits,
            output=None if config.restart else config.output,
        ),
    )
    wanted, captions = captioned(source, _SPLITS)

    def fill(output: Output) -> ModelManifest:
        start_ray()
        keep_beginning(output, source)
        checked, rejects = _check(config, network.encoder.spec, wanted, output)
        good = {
            split: {
                name: texts
                for (name, texts), fine in zip(
                    images.items(), checked.good.holds(list(images)), strict=True
                )
                if fine
            }
            for split, images in captions.items()
        }
        table = output.work("captions.parquet")
        write_captions(table, good)
        learning = sum(part.numel() for part in network.encoder.learning())
        logger.info(
            "finetuning %s on %s pictures: of its encoder the last %d stage%s, %s parameters",
            model.directory.uri,
            f"{len(good['train']):,}",
            config.stages,
            "s" if config.stages > 1 else "",
            f"{learning:,}",
        )
        remote = config.model.startswith(PREFIX)
        absolute = config.model if remote else storage.absolute(config.model)
        arguments = {
            "config": config.model_copy(update={"model": absolute}).model_dump_json(),
            "captions": table,
            "source": ray.put(source),
        }
        files = learn(
            config,
            output,
            Work(finetune_worker, arguments, fed=True),
            lambda learnt: _write_model(config, output, model, learnt),
            callbacks,
        )
        return ModelManifest(files=[*files, *rejects])

    digest = hashlib.sha256(json.dumps(captions).encode()).hexdigest()
    identity: dict[str, Any] = {
        "job": "finetune",
        "model": model.directory.version,
        "encoder": encoder_entry.sha256,
        "source": source.identity().claim(),
        "captions": digest,
        "training": config.model_dump(mode="json", exclude=_NO_MATTER),
    }
    return publish_trained(config, identity, fill)


def _check(
    config: FinetuneConfig, spec: EncoderSpec, source: Source, output: Output
) -> tuple[Rows, list[FileEntry]]:
    """Load every picture once, so that all workers know which there are before the first step.

    Raises:
        SourceError: too many were rejected.
        OutOfReachError: some could not be read.
    """
    total = source.num_images()
    logger.info("checking %s pictures", f"{total:,}")
    run_pipeline(
        source,
        output,
        _CHECKED,
        pa.schema([field for field in SOURCE_ROWS if field.name != "bytes"]),
        CheckPictures(spec.fit, config.limits),
        batch_size=_CHECK_BATCH,
        pool=PoolPlan(1, num_gpus=0, threads=1),
        retry_seconds=config.retry_seconds,
        accept_unreadable=config.accept_unreadable,
    )
    rows = finish_rows(output, _CHECKED, total)
    return rows, report_rejects(output, rows.failed, len(rows), config.max_reject_fraction)


def write_captions(uri: str, captions: dict[Split, Captions]) -> None:
    """Write the table of captions that workers read.

    Raises:
        SourceError: a split has none.
    """
    rows = []
    for split, images in captions.items():
        if not images:
            raise SourceError(f"no picture of split {split!r} can be loaded")
        rows += [
            {"split": split, "image_id": name, "captions": texts} for name, texts in images.items()
        ]
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, _CAPTIONS), file)
    storage.write_bytes(uri, file.getvalue())


def _write_model(
    config: FinetuneConfig, output: Output, model: LoadedModel, learnt: Learnt
) -> list[FileEntry]:
    """Write a model directory, all but its manifest."""
    network = build(model, config.stages)
    network.load_state_dict(safetensors.torch.load(learnt.best))
    spec, tensors = network.encoder.described()
    record = model.record
    files = save_model(
        output,
        weights=pack_weights(network.decoder),
        vocabulary=model.vocabulary,
        ngrams=model.ngrams,
        decoder=record.decoder,
        text=record.text,
        decode=record.decode,
        encoder=EncoderRecord(spec=spec, weights=f"{record.encoder.weights}, finetuned"),
        encoder_weights=safetensors.torch.save(tensors),
        training=config.model_dump(mode="json"),
    )
    return [*files, *write_history(output, learnt.history)]
