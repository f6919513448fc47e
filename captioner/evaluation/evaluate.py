"""Scores a model on one split of a feature store: captions found freely, and loss and accuracy under teacher forcing.

The two never share a name: ``standard`` and ``notebook`` scores compare free-running captions with the references,
``loss`` and ``accuracy`` are those of the next word given the reference's own beginning.
"""

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from captioner import notebook, storage
from captioner.artifacts.feature_store import FeatureStore
from captioner.artifacts.manifests import ReportManifest
from captioner.artifacts.model_directory import ModelDirectory, check_features_fit, load_model
from captioner.artifacts.output import Output, publish_once
from captioner.artifacts.tensorboard import add_picture, event_file
from captioner.config import DecodeConfig, EvaluateConfig
from captioner.evaluation.pictures import choose_images, draw_report
from captioner.evaluation.pipeline import score_split
from captioner.evaluation.ptb import has_java
from captioner.evaluation.scores import caption_statistics, score_standard
from captioner.features.leaks import tell_leaks
from captioner.runtime.cluster import start_ray

SCORES, PREDICTIONS = "scores.json", "predictions.parquet"


@dataclass(frozen=True)
class Report:
    """What an evaluation found."""

    uri: str
    scores: dict[str, Any]
    """The content of ``scores.json``."""


def evaluate(config: EvaluateConfig) -> Report:
    """Score ``config.model`` on a split and publish scores.json, predictions.parquet and pictures.

    Raises:
        StoreError: the features, the split or its captions are missing; the output belongs to another run.
        ModelError: the model is unusable or was trained on other features.
        ConfigError: it cannot be searched as asked.
    """
    store = FeatureStore.open(config.features)
    # All of it, once, before every actor of a cluster finds the same damage.
    model = load_model(config.model).directory
    check_features_fit(model.record, store.manifest)
    decode = model.search(config.decode)
    store.require(config.split, (), captions=True)
    identity = {
        "job": "evaluate",
        "model": model.version,
        "features": store.identity(),
        "split": config.split,
        "decode": decode.model_dump(mode="json"),
    }
    publish_once(
        config.output,
        identity,
        ReportManifest,
        lambda output: _fill(config, output, store, model, decode),
        restart=config.restart,
    )
    root = storage.absolute(config.output)
    return Report(root, storage.read_json(storage.join(root, SCORES)))


def _fill(
    config: EvaluateConfig,
    output: Output,
    store: FeatureStore,
    model: ModelDirectory,
    decode: DecodeConfig,
) -> ReportManifest:
    start_ray()
    record = model.record
    captions = store.captions(config.split)
    chosen = choose_images(list(captions), config.seed)
    rows = score_split(
        store,
        config.split,
        captions,
        model,
        decode,
        drawn=frozenset(chosen[: config.attention_images]),
        batch_size=config.batch_size,
    )
    references = [captions[name] for name in rows["image_id"].to_pylist()]
    hypotheses = rows["caption"].to_pylist()
    standard = score_standard(references, hypotheses, meteor=config.meteor and has_java())
    loss, correct, targets = (
        pc.sum(rows[name]).as_py() for name in ("loss_sum", "correct", "targets")
    )
    leaks = tell_leaks(store, config.split)
    scores = {
        "standard": {**standard.corpus, "tokenizer": standard.tokenizer},
        "notebook": notebook.score(
            references, hypotheses, cleaned=record.text.rules == "notebook"
        ).model_dump(),
        "loss": loss / targets,
        "accuracy": correct / targets,
        "images": len(rows),
        "split": config.split,
        "decode": decode.model_dump(),
        "in_train": sum(len(found.pairs) for found in leaks),
        "statistics": {
            "captions": caption_statistics(hypotheses),
            "references": caption_statistics([text for texts in references for text in texts]),
        },
    }
    predictions = {
        **{name: rows[name] for name in ("image_id", "caption", "log_prob")},
        "references": pa.array(references, pa.list_(pa.string())),
        **{name: pa.array(values, pa.float32()) for name, values in standard.per_image.items()},
    }
    looked = {name: rows[name] for name in ("words", "attention")}
    scored = pa.table({**predictions, **looked})
    pictures = draw_report(scored, chosen, store.thumbnails, fit=record.encoder.spec.fit)
    table = io.BytesIO()
    pq.write_table(pa.table(predictions), table)
    files = [
        output.write(PREDICTIONS, table.getvalue()),
        output.write(SCORES, json.dumps(scores, indent=1).encode()),
    ]
    with event_file(output, "report", files) as writer:
        for name, value in standard.corpus.items():
            writer.add_scalar(f"standard/{name}", value)
        for name, picture in pictures:
            files.append(output.write(name, picture))
            add_picture(writer, name.removesuffix(".png"), picture)
    return ReportManifest(
        model=model.uri,
        features=store.uri,
        split=config.split,
        images=len(rows),
        files=files,
    )


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
