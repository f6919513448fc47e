"""Scores a model on one split of a feature store or of a source: captions found freely, and loss and accuracy under
teacher forcing.

The two never share a name: ``standard`` and ``notebook`` scores compare free-running captions with the references,
``loss`` and ``accuracy`` are those of the next word given the reference's own beginning.
"""

import hashlib
import io
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from captioner import notebook, storage
from captioner.artifacts.feature_store import FeatureStore
from captioner.artifacts.manifests import FileEntry, ReportManifest
from captioner.artifacts.model_directory import ModelDirectory, check_features_fit
from captioner.artifacts.models import Model
from captioner.artifacts.output import Output, publish_once
from captioner.artifacts.tables import THUMBNAIL
from captioner.artifacts.tensorboard import add_picture, event_file
from captioner.captioning.captioner import load_whole
from captioner.config import DecodeConfig, EvaluateConfig
from captioner.errors import ConfigError, ModelError
from captioner.evaluation.on_pictures import score_pictures
from captioner.evaluation.pictures import choose_images, draw_report
from captioner.evaluation.pipeline import score_split
from captioner.evaluation.ptb import has_java
from captioner.evaluation.scores import caption_statistics, score_standard
from captioner.features.leaks import tell_leaks
from captioner.runtime.cluster import start_ray
from captioner.sources import open_source
from captioner.sources.beginning import keep_beginning
from captioner.sources.captioned import Captions, captioned
from captioner.sources.outage import patiently

SCORES, PREDICTIONS = "scores.json", "predictions.parquet"


@dataclass(frozen=True)
class Report:
    """What an evaluation found."""

    uri: str
    scores: dict[str, Any]
    """The content of ``scores.json``."""


class Scored(NamedTuple):
    """A split, scored."""

    rows: pa.Table
    """``image_id`` and ``SCORED`` of its images with captions, sorted by id."""
    thumbnails: Callable[[Sequence[str]], dict[str, bytes]]
    """Small pictures of those that have one, by id."""
    in_train: int | None
    """Pictures that are in train, too; None where nobody looked."""
    listed: Sequence[FileEntry] = ()
    """What else was published."""


Score = Callable[[Output, frozenset[str]], Scored]
"""Scores a split, given the ids of the images whose attention is drawn."""


def evaluate(config: EvaluateConfig) -> Report:
    """Score ``config.model`` on a split and publish scores.json, predictions.parquet and pictures.

    Raises:
        StoreError: the features, the split or its captions are missing; the output belongs to another run.
        SourceError: the source has no such captions, or too many of its pictures were rejected.
        ModelError: the model is unusable or was trained on other features.
        ConfigError: it cannot be searched as asked.
        OutOfReachError: pictures could not be read.
    """
    # All of it, once, before every actor of a cluster finds the same damage.
    model = load_whole(config.model)
    decode = model.search(config.decode)
    captions, about, score = (_of_store if config.source is None else _of_source)(
        config, model, decode
    )
    identity = {
        "job": "evaluate",
        "model": model.version,
        **about,
        "split": config.split,
        "decode": decode.model_dump(mode="json"),
    }
    publish_once(
        config.output,
        identity,
        ReportManifest,
        lambda output: _fill(config, output, captions, score, model, decode),
        restart=config.restart,
    )
    root = storage.absolute(config.output)
    return Report(root, storage.read_json(storage.join(root, SCORES)))


def _of_store(
    config: EvaluateConfig, model: Model, decode: DecodeConfig
) -> tuple[Captions, dict[str, Any], Score]:
    """References, identity and scores of a feature store's split."""
    assert config.features is not None
    if not isinstance(model, ModelDirectory):
        raise ConfigError(f"features: {model.kind} reads pictures, no features: give source")
    store = FeatureStore.open(config.features)
    try:
        check_features_fit(model.record, store.manifest)
    except ModelError as error:
        source = shlex.quote(store.manifest.source.uri)
        raise ModelError(
            f"{error}; on the pictures themselves: evaluate --source {source} --model {shlex.quote(config.model)} "
            f"--split {config.split} --output {shlex.quote(config.output)}"
        ) from error
    store.require(config.split, (), captions=True)
    captions = store.captions(config.split)

    def score(_: Output, drawn: frozenset[str]) -> Scored:
        rows = score_split(
            store, config.split, captions, model, decode, drawn=drawn, batch_size=config.batch_size
        )
        leaks = tell_leaks(store, config.split)
        return Scored(rows, store.thumbnails, sum(len(found.pairs) for found in leaks))

    return captions, {"features": store.identity()}, score


def _of_source(
    config: EvaluateConfig, model: Model, decode: DecodeConfig
) -> tuple[Captions, dict[str, Any], Score]:
    """References, identity and scores of the pictures of a source's split."""
    assert config.source is not None
    spec, begun = config.source, None if config.restart else config.output
    source = patiently(
        config.retry_seconds,
        lambda: open_source(spec, config.source_options, limits=config.limits, output=begun),
    )
    wanted, by_split = captioned(source, (config.split,))
    captions = by_split[config.split]

    def score(output: Output, drawn: frozenset[str]) -> Scored:
        keep_beginning(output, source)
        rows, rejects = score_pictures(wanted, captions, output, model, decode, config, drawn)
        small = dict(zip(rows["image_id"].to_pylist(), rows[THUMBNAIL.name], strict=True))
        return Scored(
            rows,
            lambda ids: {one: small[one].as_py() for one in ids if small[one].is_valid},
            None,
            rejects,
        )

    digest = hashlib.sha256(json.dumps(captions).encode()).hexdigest()
    limits = config.limits.model_dump(mode="json")
    identity = {"source": source.identity().claim(), "captions": digest, "limits": limits}
    return captions, identity, score


def _fill(
    config: EvaluateConfig,
    output: Output,
    captions: Captions,
    score: Score,
    model: Model,
    decode: DecodeConfig,
) -> ReportManifest:
    start_ray()
    chosen = choose_images(list(captions), config.seed)
    found = score(output, frozenset(chosen[: config.attention_images]))
    rows = found.rows
    scored_ids = rows["image_id"].to_pylist()
    references = [captions[name] for name in scored_ids]
    hypotheses = rows["caption"].to_pylist()
    standard = score_standard(references, hypotheses, meteor=config.meteor and has_java())
    loss, correct, targets = (
        pc.sum(rows[name]).as_py() for name in ("loss_sum", "correct", "targets")
    )
    scores = {
        "standard": {**standard.corpus, "tokenizer": standard.tokenizer},
        "notebook": notebook.score(
            references,
            hypotheses,
            cleaned=isinstance(model, ModelDirectory) and model.record.text.rules == "notebook",
        ).model_dump(),
        # Of a model that says nothing about next words, nothing.
        "loss": loss / targets if targets else None,
        "accuracy": correct / targets if targets else None,
        "images": len(rows),
        "split": config.split,
        "decode": decode.model_dump(),
        "in_train": found.in_train,
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
    there = set(scored_ids)
    chosen = [name for name in chosen if name in there]
    pictures = draw_report(scored, chosen, found.thumbnails, fit=model.fit)
    table = io.BytesIO()
    pq.write_table(pa.table(predictions), table)
    files = [
        *found.listed,
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
        features=None if config.features is None else storage.absolute(config.features),
        source=config.source,
        split=config.split,
        images=len(rows),
        files=files,
    )


def score_table(report: Report) -> str:
    """The scores as a table for a terminal; the notebook's protocol stands beside the standard one, never alone."""
    standard: Mapping[str, Any] = report.scores["standard"]
    own: Mapping[str, float] = report.scores["notebook"]
    search = ", ".join(
        f"{name} {value}" for name, value in report.scores["decode"].items() if value
    )
    lines = [f"{report.scores['images']} images, split {report.scores['split']}", search, ""]
    lines.append(f"{'':10}{'standard':>10}{'notebook':>10}")
    for name, value in standard.items():
        if isinstance(value, float):
            beside = f"{own[name]:10.4f}" if name in own else ""
            lines.append(f"{name:10}{value:10.4f}{beside}")
    if report.scores["loss"] is not None:
        lines += ["", "next word, teacher forcing:"]
        lines += [f"{name:10}{report.scores[name]:10.4f}" for name in ("loss", "accuracy")]
    found = report.scores["statistics"]
    lines += ["", f"{'':20}{'captions':>12}{'references':>12}"]
    for name in ("distinct_captions", "vocabulary", "mean_length", "longest"):
        pair = [f"{found[side][name]:12,.4g}" for side in ("captions", "references")]
        lines.append(f"{name.replace('_', ' '):20}{''.join(pair)}")
    return "\n".join([*lines, "", f"report: {report.uri}"])
