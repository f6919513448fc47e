"""Stops a run at every change of its store in turn, runs the same command again, and compares what is published.

python -m tests.cluster.store_fuzz --job extract --store s3
"""

import argparse
import contextlib
import hashlib
import json
import logging
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray

from captioner import storage
from captioner.artifacts import lease
from captioner.artifacts.manifests import Manifest, open_manifest
from captioner.artifacts.output import CONTENTS, WORK
from captioner.artifacts.verify import verify
from captioner.captioning.collection import caption_collection
from captioner.config import (
    CaptionConfig,
    DecodeOverrides,
    DecoderConfig,
    EncoderConfig,
    EvaluateConfig,
    ExtractConfig,
    TrainConfig,
    TuneConfig,
)
from captioner.evaluation.evaluate import evaluate
from captioner.features.extract import extract
from captioner.runtime.cluster import start_local_ray
from captioner.training.run import run_training
from captioner.tuning.search import run_search
from tests.models import write_model
from tests.pictures import picture
from tests.s3 import S3Server, clients_of, run_server
from tests.stopping import NEVER, Tickets, stopping_locally, stopping_on_s3
from tests.stores import write_store

PICTURES, BAD = 9, 2
VECTORS = "vectors"
SMALL = DecoderConfig(width=8, output_width=8, dropout=0.0)


@dataclass
class World:
    """What the jobs read, and where they write."""

    folder: Path
    server: S3Server
    bucket: str
    outputs: int = 0
    expected: dict[tuple[str, str], tuple[dict[str, Any], int]] = field(default_factory=dict)
    """By job and store, what an undisturbed run publishes, and how often it changes its store."""

    def config(self, job: str, output: str) -> Any:
        features, model, photos = (str(self.folder / n) for n in ("features", "model", "photos"))
        if job == "extract":
            random_encoder = EncoderConfig(
                weights="random", layer="layer3", compute="float32", input_size=64
            )
            return ExtractConfig(
                source=photos,
                output=output,
                encoder=random_encoder,
                max_reject_fraction=0.5,
                batch_size=2,
            )
        if job.startswith("caption"):
            return CaptionConfig(
                images=photos,
                model=model,
                output=output,
                decode=DecodeOverrides(max_length=4),
                batch_size=2,
                format="jsonl" if job == "caption-jsonl" else "parquet",
                contact_sheet=True,
            )
        if job == "train":
            return TrainConfig(
                features=features,
                output=output,
                decoder=SMALL,
                epochs=2,
                patience=None,
                compute="float32",
            )
        if job == "tune":
            return TuneConfig(features=features, output=output, max_epochs=1, max_concurrent=2)
        return EvaluateConfig(features=features, model=model, output=output, meteor=False)


JOBS: dict[str, Callable[[Any], Any]] = {
    "extract": extract,
    "caption": caption_collection,
    "caption-jsonl": caption_collection,
    "train": run_training,
    "evaluate": evaluate,
    "tune": run_search,
}


def furnish(folder: Path, pictures: int = PICTURES) -> None:
    """Things to work on."""
    photos = folder / "photos"
    photos.mkdir()
    for number in range(pictures - BAD):
        (photos / f"{number:03d}.png").write_bytes(picture(number))
    for number in range(BAD):
        (photos / f"bad{number}.jpg").write_text("no picture")
    lines = [f"{file.name},a thing\n" for file in sorted(photos.iterdir())]
    (photos / "captions.csv").write_text("image,caption\n" + "".join(lines))
    write_store(folder / "features", {"train": 12, "validation": 4})
    write_model(folder / "model")


@contextlib.contextmanager
def world(folder: Path) -> Iterator[World]:
    """A Ray that finds the bucket, and things to work on."""
    furnish(folder)
    with (
        run_server() as server,
        clients_of(server, "fuzzed") as bucket,
        pytest.MonkeyPatch.context() as patch,
    ):
        # So that what a stopped run holds is soon free again.
        for name, seconds in {"BEAT": 0.5, "LOOK": 0.2, "STALE": 2.0}.items():
            patch.setattr(lease, name, seconds)
        start_local_ray(
            num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING
        )
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        try:
            yield World(folder, server, bucket)
        finally:
            ray.shutdown()


def published(uri: str) -> dict[str, Any]:
    """What a directory holds, whatever its files are called, and how rows are spread over them."""
    manifest = open_manifest(uri, Manifest)
    assert verify(uri).problems == []
    assert {entry.path.split("/")[0] for entry in manifest.files} <= CONTENTS
    left = [
        f.path for f in storage.list_files(uri) if f.path.startswith(WORK) or ".partial" in f.path
    ]
    assert left == []
    found: dict[str, Any] = manifest.model_dump(
        exclude={"files", "removed", "features", "model", "source"}, mode="json"
    )
    vectors: dict[str, list[float] | None] = {}
    gone = set()
    if removed := getattr(manifest, "removed", None):
        with storage.open_input(removed.uri(uri)) as file:
            gone = {(row["file"], row["image_id"]) for row in pq.read_table(file).to_pylist()}
    for entry in manifest.files:
        data = storage.read_bytes(entry.uri(uri))
        name = entry.path.split("/")
        if name[0] in ("features", "captions") and len(name) > 1:
            with storage.open_input(entry.uri(uri)) as file:
                rows = pq.read_table(file)
            # Scores differ in their last digits with what else is in a batch.
            spread = ("mtime", "log_prob", "alternatives", "thumbnail")
            rows = rows.drop_columns([n for n in spread if n in rows.column_names])
            if "pooled" in rows.column_names:
                for row in rows.select(["image_id", "pooled"]).to_pylist():
                    if (entry.path, row["image_id"]) not in gone:
                        vectors[row["image_id"]] = row["pooled"]
                rows = rows.drop_columns(["pooled"])
            found.setdefault(name[0], []).extend(
                str(row) for row in rows.to_pylist() if (entry.path, row["image_id"]) not in gone
            )
        elif name[0] == "captions.jsonl":
            lines = map(json.loads, data.splitlines())
            found[name[0]] = sorted(f"{row['image_id']}: {row['caption']}" for row in lines)
        elif name[-1] in (
            "weights.safetensors",
            "vocab.json",
            "encoder.safetensors",
            "scores.json",
        ):
            found[entry.path] = hashlib.sha256(data).hexdigest()
        else:
            found[entry.path] = True
    for name in ("features", "captions"):
        if isinstance(found.get(name), list):
            found[name].sort()
    found[VECTORS] = [vectors[name] for name in sorted(vectors)]
    return found


def differing(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """In what two published directories are not the same."""
    names = [name for name in found.keys() | expected.keys() if name != VECTORS]
    differ = [name for name in sorted(names) if found.get(name) != expected.get(name)]
    # Their last digits may depend on what else is in a batch.
    one, two = (
        [np.zeros(0) if row is None else np.asarray(row) for row in side.get(VECTORS, [])]
        for side in (found, expected)
    )
    alike = len(one) == len(two) and all(
        a.shape == b.shape and np.allclose(a, b, rtol=1e-3, atol=1e-4)
        for a, b in zip(one, two, strict=False)
    )
    return [*differ, *([] if alike else [VECTORS])]


def run_stopped(world: World, job: str, store: str, stops: list[int]) -> tuple[dict[str, Any], int]:
    """Run a job's command once for each stop, which ends it at that change, and then to its end.

    Returns:
        what is published, and the changes that the last run made.
    """
    world.outputs += 1
    name = f"{job}-{world.outputs}"
    local = world.folder / "outputs" / name
    uri = str(local) if store == "local" else f"{world.bucket}/{name}"
    config = world.config(job, uri)
    for stop in [*stops, NEVER]:
        tickets = Tickets(world.folder / "tickets", stop)
        with (
            stopping_locally(local, tickets)
            if store == "local"
            else stopping_on_s3(world.server, tickets)
        ):
            if stop == NEVER:
                JOBS[job](config)
            else:
                # However it fails: as good as killed, for nothing of it reaches the store any more.
                with contextlib.suppress(Exception, SystemExit):
                    JOBS[job](config)
    found = published(uri)
    changes = tickets.taken
    # And whoever asks again finds it complete, and as it is.
    JOBS[job](config)
    assert differing(published(uri), found) == []
    shutil.rmtree(local, ignore_errors=True)
    return found, changes


def undisturbed(world: World, job: str, store: str) -> tuple[dict[str, Any], int]:
    if (job, store) not in world.expected:
        world.expected[job, store] = run_stopped(world, job, store, [])
    return world.expected[job, store]


def check(world: World, job: str, store: str, stops: list[int]) -> None:
    expected, _ = undisturbed(world, job, store)
    found, _ = run_stopped(world, job, store, stops)
    if differ := differing(found, expected):
        raise AssertionError(f"stopped at {stops}, it differs in {differ}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--job", choices=JOBS, default="extract")
    parser.add_argument("--store", choices=("local", "s3"), default="local")
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--twice", type=int, help="stop so many seeded runs twice instead")
    options = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as folder, world(Path(folder)) as found:
        _, changes = undisturbed(found, options.job, options.store)
        print(f"{options.job} on {options.store}: {changes} changes of its store", flush=True)
        generator = random.Random(0)
        trials = [[stop] for stop in range(options.first - 1, changes)]
        if options.twice:
            trials = [
                [generator.randrange(changes), generator.randrange(changes)]
                for _ in range(options.twice)
            ]
        for stops in trials:
            started = time.monotonic()
            try:
                check(found, options.job, options.store, stops)
                outcome = "as undisturbed"
            except Exception as error:  # the next stop is tried as well
                failed += 1
                outcome = f"FAILED: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
            print(
                f"  stopped at {stops}: {outcome} ({time.monotonic() - started:.0f} s)", flush=True
            )
    print(f"{failed} of {len(trials)} failed")
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
