"""Scores a model on one split of a feature store: captions found freely, and loss and accuracy under teacher forcing.

The two never share a name: ``standard`` and ``notebook`` scores compare free-running captions with the references,
``loss`` and ``accuracy`` are those of the next word given the reference's own beginning.
"""

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from ray.actor import ActorHandle
from ray.data import ActorPoolStrategy
from ray.data.expressions import col

from captioner import notebook, storage
from captioner.artifacts.feature_store import FeatureStore
from captioner.artifacts.model_directory import check_features_fit, load_model, load_record
from captioner.artifacts.output import Output
from captioner.artifacts.schema import ReportManifest
from captioner.artifacts.tensorboard import add_picture, event_file
from captioner.captioning.captioner import Captioner
from captioner.config import DecodeConfig, EvaluateConfig
from captioner.errors import ModelError
from captioner.evaluation.pictures import draw_report
from captioner.evaluation.scores import StandardScores, has_java, score_standard
from captioner.runtime.cluster import PoolPlan, plan_pool, start_ray
from captioner.runtime.data_context import data_context
from captioner.runtime.device import prepare_device
from captioner.runtime.progress import ProgressLine
from captioner.text import clean
from captioner.training.steps import teacher_forcing

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Report:
    """What an evaluation found."""

    uri: str
    scores: dict[str, Any]
    """The content of ``scores.json``."""


class ScoreImages:
    """Ray Data actor: features of a batch of images -> captions and teacher-forced sums."""

    def __init__(
        self,
        model_uri: str,
        decode: DecodeConfig,
        captions: "ray.ObjectRef[dict[str, list[str]]]",
        threads: int,
        counter: ActorHandle,
    ):
        self.captioner = Captioner.load(model_uri, prepare_device(threads=threads))
        self.decode = decode
        self.captions: dict[str, list[str]] = ray.get(captions)
        self.counter = counter

    def __call__(self, batch: dict[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        model = self.captioner.model
        features = {
            name: torch.from_numpy(np.array(batch[name])).float().to(self.captioner.device)
            for name in model.decoder.columns
        }
        found = self.captioner.caption_features(features, self.decode)
        references = [self.captions[str(name)] for name in batch["image_id"]]
        image = torch.tensor([row for row, texts in enumerate(references) for _ in texts])
        text = model.record.text
        tokens = [
            model.vocabulary.encode(clean(caption, text.rules), text.max_length)
            for captions in references
            for caption in captions
        ]
        loss, correct, words = teacher_forcing(model.decoder, features, image, tokens)
        rows = len(found)
        # Waited for, a millisecond, so that the last line counts every image.
        ray.get(self.counter.add.remote(rows, 0))
        # Sums of the whole batch travel on its first row.
        first = np.arange(rows) == 0
        return {
            "image_id": batch["image_id"],
            "caption": np.array([caption.text for caption in found], object),
            "log_prob": np.array([caption.log_prob for caption in found], np.float32),
            "loss_sum": np.where(first, loss, 0.0),
            "correct": np.where(first, correct, 0),
            "words": np.where(first, words, 0),
        }


def evaluate(config: EvaluateConfig) -> Report:
    """Score ``config.model`` on a split and publish scores.json, predictions.parquet and pictures.

    Raises:
        StoreError: the features, the split or its captions are missing; the output belongs to another run.
        ModelError: the model is unusable or was trained on other features.
    """
    store = FeatureStore.open(config.features)
    model_uri = storage.absolute(config.model)
    # All of it, once, before every actor of a cluster finds the same damage.
    record = load_model(model_uri).record
    check_features_fit(record, store.manifest)
    decode = config.decode.over(record.decode)
    store.require(config.split, (), captions=True)
    output = Output(
        config.output,
        {
            "job": "evaluate",
            "model": record.weights_sha256,
            "features": store.manifest.model_dump(mode="json", include={"encoder", "source"}),
            "split": config.split,
            "decode": decode.model_dump(mode="json"),
        },
    )
    if output.complete:
        logger.info("%s is complete: nothing to do", output.root)
        return Report(output.root, storage.read_json(output.uri("scores.json")))
    with output:
        start_ray()
        captions = store.captions(config.split)
        rows = _score(config, store, model_uri, captions, decode)
        references = [captions[name] for name in rows["image_id"].to_pylist()]
        hypotheses = rows["caption"].to_pylist()
        standard = score_standard(references, hypotheses, meteor=config.meteor and has_java())
        scores = {
            "standard": standard.summary(),
            "notebook": notebook.score(
                references, hypotheses, cleaned=record.text.rules == "notebook"
            ).model_dump(),
            "loss": pa.compute.sum(rows["loss_sum"]).as_py()
            / pa.compute.sum(rows["words"]).as_py(),
            "accuracy": pa.compute.sum(rows["correct"]).as_py()
            / pa.compute.sum(rows["words"]).as_py(),
            "images": len(rows),
            "split": config.split,
            "decode": decode.model_dump(),
            "statistics": caption_statistics(references, hypotheses),
        }
        _publish(config, output, store, rows, references, scores, standard, decode)
    return Report(output.root, scores)


def score_table(report: Report) -> str:
    """The scores as a table for a terminal; the notebook's protocol stands beside the standard one, never alone."""
    standard: Mapping[str, Any] = report.scores["standard"]
    own: Mapping[str, float] = report.scores["notebook"]
    search = ", ".join(f"{name} {value}" for name, value in report.scores["decode"].items())
    lines = [f"{report.scores['images']} images, split {report.scores['split']}", search, ""]
    lines.append(f"{'':10}{'standard':>10}{'notebook':>10}")
    for name, value in standard.items():
        if isinstance(value, float):
            beside = f"{own[name]:10.4f}" if name in own else ""
            lines.append(f"{name:10}{value:10.4f}{beside}")
    lines += ["", "next word, teacher forcing:"]
    lines += [f"{name:10}{report.scores[name]:10.4f}" for name in ("loss", "accuracy")]
    found = report.scores["statistics"]
    lines += ["", f"{'':20}{'captions':>12}{'references':>12}"]
    for name in ("distinct_captions", "vocabulary", "mean_length", "longest"):
        pair = [f"{found[side][name]:12,.4g}" for side in ("captions", "references")]
        lines.append(f"{name.replace('_', ' '):20}{''.join(pair)}")
    return "\n".join([*lines, "", f"report: {report.uri}"])


def caption_statistics(
    references: Sequence[Sequence[str]], hypotheses: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """How varied and how long captions are, beside the references: counts, and lengths in cleaned words."""

    def describe(texts: list[str]) -> dict[str, Any]:
        words = [clean(text) for text in texts]
        lengths = Counter(len(caption) for caption in words)
        return {
            "captions": len(texts),
            "distinct_captions": len({" ".join(caption) for caption in words}),
            "vocabulary": len({word for caption in words for word in caption}),
            "mean_length": sum(map(len, words)) / len(words),
            "longest": max(lengths),
            "lengths": {str(length): lengths[length] for length in sorted(lengths)},
        }

    return {
        "captions": describe(list(hypotheses)),
        "references": describe([text for texts in references for text in texts]),
    }


def _score(
    config: EvaluateConfig,
    store: FeatureStore,
    model_uri: str,
    captions: dict[str, list[str]],
    decode: DecodeConfig,
) -> pa.Table:
    record = load_record(model_uri)
    filesystem, path = storage.resolve(store.uri)
    files = [
        f"{path}/{file.path}" for file in store.manifest.files if file.path.startswith("features/")
    ]
    pool: PoolPlan = plan_pool(len(captions))
    logger.info("captioning %s images of split %s", f"{len(captions):,}", config.split)
    good = (col("split") == config.split) & col("error").is_null()
    if len(captions) < store.manifest.splits[config.split].ok:
        # What has no captions cannot be scored. (Every read task carries the list.)
        good &= col("image_id").is_in(list(captions))
    with data_context(), ProgressLine(len(captions)) as progress:
        dataset = (
            ray.data.read_parquet(files, filesystem=filesystem)
            .select_columns(["image_id", "split", "error", *record.columns])
            .filter(expr=good)
            # A read task's rows are one block, which one actor would get whole.
            .repartition(target_num_rows_per_block=config.batch_size)
            .map_batches(
                ScoreImages,
                fn_constructor_kwargs={
                    "model_uri": model_uri,
                    "decode": decode,
                    "captions": ray.put(captions),
                    "threads": pool.threads,
                    "counter": progress.counter,
                },
                compute=ActorPoolStrategy(size=pool.size),
                batch_size=config.batch_size,
                num_cpus=pool.num_cpus,
                num_gpus=pool.num_gpus or None,
            )
        )
        blocks = ray.get(dataset.to_arrow_refs())
    rows = pa.concat_tables([block for block in blocks if len(block)]).sort_by("image_id")
    if rows["image_id"].to_pylist() != sorted(captions):
        raise ModelError(
            f"{store.uri}: {len(captions)} images have captions in split {config.split!r}, "
            f"{len(rows)} were scored"
        )
    return rows


def _publish(
    config: EvaluateConfig,
    output: Output,
    store: FeatureStore,
    rows: pa.Table,
    references: list[list[str]],
    scores: dict[str, Any],
    standard: StandardScores,
    decode: DecodeConfig,
) -> None:
    predictions = rows.select(["image_id", "caption", "log_prob"]).append_column(
        "references", pa.array(references, pa.list_(pa.string()))
    )
    for name, values in standard.per_image.items():
        predictions = predictions.append_column(name, pa.array(values, pa.float32()))
    with storage.atomic_writer(output.uri("predictions.parquet")) as file:
        pq.write_table(predictions, file)
    files = ["scores.json", "predictions.parquet"]
    uris = store.image_uris(config.split)
    drawn = draw_report(
        [uris[name] for name in rows["image_id"].to_pylist()],
        rows["caption"].to_pylist(),
        references,
        standard.per_image["cider"],
        Captioner.load(config.model),
        decode,
        attention_images=config.attention_images,
        seed=config.seed,
    )
    with event_file(output, "report") as writer:
        for name, value in scores["standard"].items():
            if isinstance(value, float):
                writer.add_scalar(f"standard/{name}", value)
        for name, picture in drawn:
            storage.write_bytes(output.uri(name), picture)
            files.append(name)
            add_picture(writer, name.removesuffix(".png"), picture)
    storage.write_bytes(output.uri("scores.json"), json.dumps(scores, indent=1).encode())
    manifest = ReportManifest(
        model=storage.absolute(config.model),
        features=store.uri,
        split=config.split,
        images=len(rows),
        files=files,
    )
    output.publish(manifest.model_dump_json(indent=1))
