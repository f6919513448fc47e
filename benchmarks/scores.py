"""The figures of a published report and of the training behind it, as one row: scores, losses, speed."""

import statistics
from collections.abc import Sequence

import pyarrow.parquet as pq

from benchmarks.config import BenchmarkScoresConfig
from benchmarks.measurement import Measurement, Row
from captioner import storage
from captioner.artifacts.manifests import ReportManifest, open_manifest
from captioner.artifacts.model_directory import open_model


class ScoresBenchmark(Measurement):
    """What a report and its model say."""

    figures: dict[str, str | int | float | None]

    def table(self) -> str:
        return "\n".join(f"{name:22}{value}" for name, value in self.figures.items())

    def rows(self) -> Sequence[Row]:
        return [self.figures]


def benchmark_scores(config: BenchmarkScoresConfig) -> ScoresBenchmark:
    """Collect the figures of ``config.report``.

    Raises:
        StoreError, ModelError: the report or its model is not there.
    """
    report = open_manifest(config.report, ReportManifest)
    scores = storage.read_json(storage.join(config.report, "scores.json"))
    record = open_model(report.model).record
    with storage.open_input(storage.join(report.model, "history.parquet")) as file:
        epochs = pq.read_table(file).to_pylist()
    best = storage.read_json(storage.join(report.model, "metrics.json"))
    decoder, decode = record.decoder, scores["decode"]
    return ScoresBenchmark(
        figures={
            "name": config.name,
            "decoder": decoder.kind,
            "ensemble_size": decoder.ensemble_size,
            "width": decoder.width,
            "vocabulary": record.vocabulary_size,
            "parameters": record.parameters,
            "epochs": len(epochs),
            "best_epoch": best["epoch"],
            "training_seconds": sum(epoch["seconds"] for epoch in epochs),
            "captions_per_second": statistics.median(e["captions_per_second"] for e in epochs),
            "data_wait_fraction": statistics.median(e["data_wait_fraction"] for e in epochs),
            "split": report.split,
            "images": report.images,
            **{name: decode[name] for name in ("beam_size", "mbr_samples")},
            "loss": scores["loss"],
            "accuracy": scores["accuracy"],
            **scores["standard"],
            **{f"notebook_{name}": value for name, value in scores["notebook"].items()},
        }
    )
