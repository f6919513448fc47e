"""Extraction on a real Ray: whatever is killed and continued, every image comes out once, with its own vector."""

import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
from PIL import Image

from captioner.artifacts.feature_store import FeatureStore
from captioner.artifacts.manifests import StoreManifest
from captioner.config import EncoderConfig, ExtractConfig, ImageLimits
from captioner.encoders.encoder import Encoder
from captioner.errors import OutOfReachError, SourceError, StoreError
from captioner.features.extract import extract
from captioner.features.row_marks import CHECKPOINT
from captioner.images.load import load_image
from captioner.images.views import other_views
from captioner.sources.scenes import draw_scene

ROOT = Path(__file__).resolve().parents[2]
IMAGES = 120
BATCH = 8
MARKS = f"_work/{CHECKPOINT}"
LIMITS = ImageLimits(max_bytes=2**19)

pytestmark = [pytest.mark.usefixtures("local_ray"), pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pictures: its pieces are smaller than those of ``shapes``, so that a run has more to be killed in."""
    folder = tmp_path_factory.mktemp("photos")
    for index in range(IMAGES):
        (folder / f"{index:03d}.png").write_bytes(draw_scene(0, "train", index))
    return folder


def settings(source: Path, output: Path, **changes: object) -> ExtractConfig:
    base = {
        "source": str(source),
        "output": str(output),
        "encoder": EncoderConfig(weights="random", layer="layer3", compute="float32"),
        "batch_size": BATCH,
    }
    return ExtractConfig.model_validate(base | changes)


@pytest.fixture(scope="module")
def unbroken(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """Vectors of an undisturbed run, by image id."""
    output = tmp_path_factory.mktemp("unbroken") / "features"
    extract(settings(photos, output))
    return vectors(output)


def vectors(output: Path) -> dict[str, np.ndarray]:
    """Vectors of a store, of which every promise that needs no comparison is checked first."""
    manifest = StoreManifest.model_validate_json((output / "manifest.json").read_text())
    rows = pq.read_table(
        [output / file.path for file in manifest.files if "features/" in file.path]
    )
    names = rows["image_id"].to_pylist()
    assert len(names) == len(set(names)) == manifest.counts.images
    assert sum(file.rows for file in manifest.files if "features/" in file.path) == len(names)
    there = {f"features/{file.name}" for file in (output / "features").iterdir()}
    assert there == {file.path for file in manifest.files if "features/" in file.path}
    assert not (output / "_work").exists()
    newest = max(file.stat().st_mtime_ns for file in output.glob("*/*"))
    assert newest <= (output / "manifest.json").stat().st_mtime_ns
    table = FeatureStore.open(str(output)).load("test", ("pooled",))
    return dict(zip(table.image_ids, table.columns["pooled"], strict=True))


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    # To the byte, though another run cuts other batches: on one machine a vector does not depend on its neighbours.
    assert [name for name in expected if found[name].tobytes() != expected[name].tobytes()] == []
    # Vectors that are all alike would pass above whatever image they belong to.
    assert len({vector.tobytes() for vector in expected.values()}) > 0.9 * len(expected)


def start(config: ExtractConfig, *, own_ray: bool) -> "subprocess.Popen[str]":
    """``python -m ray_jobs.extract_features`` in a child, on a Ray of its own or as a driver of this module's."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    if not own_ray:
        environment["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "ray_jobs.extract_features",
            "--source",
            config.source,
            "--output",
            config.output,
            "--encoder.weights",
            "random",
            "--encoder.layer",
            "layer3",
            "--encoder.compute",
            "float32",
            "--batch-size",
            str(config.batch_size),
            *(["--grid"] if config.grid else []),
        ],  # fmt: skip
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def marks(output: Path) -> int:
    """Output files that are complete."""
    return len([file for file in output.glob(f"{MARKS}/*") if ".pending" not in file.name])


def wait_for_marks(output: Path, count: int, child: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 200
    while marks(output) < count or not (output / "features").exists():
        if child.poll() is not None:
            pytest.fail(f"ended before it could be killed: {child.communicate()[1][-2000:]}")
        assert time.monotonic() < deadline, "no file was finished"
        time.sleep(0.01)


@pytest.mark.chaos
def test_killed_again_and_again_it_continues_and_ends_as_if_unbroken(
    photos: Path, unbroken: dict[str, np.ndarray], tmp_path: Path
) -> None:
    output, generator = tmp_path / "features", random.Random(20)
    kept: list[int] = []
    for kill in range(3):
        child = start(settings(photos, output), own_ray=kill == 2)
        # The first dies with nothing done; the others when they have added at least one file.
        wait_for_marks(output, kept[-1] + 1 if kept else 0, child)
        if kill == 1:
            with pytest.raises(OutOfReachError, match="is being written by another process"):
                extract(settings(photos, output))
        time.sleep(generator.uniform(0, 0.4))
        child.send_signal(signal.SIGKILL)
        child.communicate()
        kept.append(marks(output))
        assert not (output / "manifest.json").exists()
    assert kept == sorted(kept)
    written = {file: file.stat().st_mtime_ns for file in (output / "features").iterdir()}
    manifest = extract(settings(photos, output))
    assert manifest.counts.ok == IMAGES
    assert_same(vectors(output), unbroken)
    # Files that were finished before the last run are still the same: it did not begin anew.
    survivors = [
        file for file, when in written.items() if file.exists() and file.stat().st_mtime_ns == when
    ]
    assert len(survivors) >= kept[-1]


@pytest.mark.chaos
def test_killed_encoder_is_replaced(
    photos: Path, unbroken: dict[str, np.ndarray], tmp_path: Path
) -> None:
    output, killed = tmp_path / "features", []

    def kill_once_started() -> None:
        while not marks(output):
            time.sleep(0.01)
        for pid in encoder_processes():
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)

    thread = threading.Thread(target=kill_once_started, daemon=True)
    thread.start()
    extract(settings(photos, output))
    thread.join(timeout=10)
    assert killed
    assert_same(vectors(output), unbroken)


def encoder_processes() -> list[int]:
    """Encoder actors of this test's own Ray: its raylet is a child of this process."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True)
    rows = [line.split(maxsplit=2) for line in listed.stdout.splitlines()]
    raylets = {pid for pid, parent, *_ in rows if parent == str(os.getpid())}
    return [
        int(pid)
        for pid, parent, *arguments in rows
        if parent in raylets and arguments and "_StageActor" in arguments[0]
    ]


@pytest.fixture(scope="module")
def damaged(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve good pictures and four bad ones."""
    folder = tmp_path_factory.mktemp("damaged")
    for file in sorted(photos.iterdir())[:12]:
        shutil.copy(file, folder)
    whole = (photos / "000.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("not a picture")
    (folder / "long.png").write_bytes(whole + bytes(2**19))
    return folder


@pytest.fixture(scope="module")
def ended_early(damaged: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that came to its last row and not to its manifest: too many of its images were rejected."""
    output = tmp_path_factory.mktemp("ended") / "features"
    with pytest.raises(SourceError, match=r"^4 of 16 images were rejected, .* 0\.01") as one:
        extract(settings(damaged, output, limits=LIMITS))
    assert "\n" not in str(one.value)
    assert not (output / "manifest.json").exists()
    return output


@pytest.fixture
def resumed(damaged: Path, ended_early: Path, tmp_path: Path) -> ExtractConfig:
    """That run's directory, and settings with which only publishing is left."""
    output = shutil.copytree(ended_early, tmp_path / "features")
    return settings(damaged, output, limits=LIMITS, max_reject_fraction=0.5)


def test_bad_images_are_counted_and_named_and_nothing_is_encoded_again(
    damaged: Path, resumed: ExtractConfig
) -> None:
    output = Path(resumed.output)
    before = {file: file.stat().st_mtime_ns for file in (output / "features").iterdir()}
    manifest = extract(resumed)
    assert before == {file: file.stat().st_mtime_ns for file in (output / "features").iterdir()}
    rows = pq.read_table(output / "features").to_pylist()
    errors = {row["image_id"]: row["error"] for row in rows if row["error"] is not None}
    assert errors.keys() == {"cut.png", "empty.jpg", "text.jpg", "long.png"}
    assert all(reason and "\n" not in reason for reason in errors.values())
    assert len(set(errors.values())) >= 3
    assert manifest.counts.ok == 12
    assert (manifest.counts.images, manifest.counts.rejected) == (len(rows), 4) == (16, 4)
    assert all((row["pooled"] is None) == (row["image_id"] in errors) for row in rows)
    assert len(vectors(output)) == 12
    assert {row["error_kind"] for row in rows} == {None, "final"}
    for row in rows:
        data = (damaged / row["image_id"]).read_bytes()
        assert row["size"] == len(data)
        # What is over the limit is not even read.
        assert row["sha256"] in (None, hashlib.sha256(data).hexdigest())
        assert row["mtime"] is not None
        assert (row["thumbnail"] is None) == (row["image_id"] in errors)
    thumbnails = FeatureStore.open(str(output)).thumbnails(["000.png", "cut.png", "absent"])
    assert list(thumbnails) == ["000.png"]
    with Image.open(io.BytesIO(thumbnails["000.png"])) as small:
        assert small.size == (160, 160)


def test_another_machine_another_listing_and_corrected_captions_encode_nothing_again(
    damaged: Path,
    resumed: ExtractConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder, output = Path(shutil.copytree(damaged, tmp_path / "photos")), tmp_path / "store"
    encoder = EncoderConfig(weights="random", layer="layer3", compute="auto")
    monkeypatch.setattr("captioner.features.extract.compute_on_cluster", lambda _: "float32")
    config = settings(folder, output, limits=LIMITS, encoder=encoder)
    with pytest.raises(SourceError, match=r"^4 of 16 images were rejected"):
        extract(config)
    written = {file: file.stat().st_mtime_ns for file in (output / "features").iterdir()}
    monkeypatch.setattr("captioner.features.extract.compute_on_cluster", lambda _: "bfloat16")
    shutil.copy(folder / "000.png", folder / "new.png")
    (folder / "001.png").unlink()
    table = (
        "image,caption,split\n000.png,A corrected caption,train\n001.png,Of one that is gone,test\n"
    )
    (folder / "captions.csv").write_text(table)
    config = config.model_copy(update={"max_reject_fraction": 0.5})
    manifest = extract(config)
    assert written == {file: file.stat().st_mtime_ns for file in (output / "features").iterdir()}
    assert (manifest.counts.ok, manifest.counts.rejected) == (12, 4)
    assert manifest.encoder.spec.precision == "float32"
    store = FeatureStore.open(str(output))
    assert store.captions("train") == {"000.png": ["A corrected caption"]}
    assert store.captions("test") == {"001.png": ["Of one that is gone"]}
    assert "--extends" not in caplog.text
    (folder / "captions.csv").unlink()
    assert extract(config) == manifest
    assert "the images have changed since" in caplog.text
    assert "--extends" in caplog.text


def test_a_mark_left_twice_costs_no_rows(resumed: ExtractConfig) -> None:
    """On S3 a rename is a copy and a delete: killed between them, both the pending mark and the final one are there."""
    output = Path(resumed.output)
    mark = next((output / MARKS).iterdir())
    shutil.copy(mark, mark.with_name(f"{mark.stem}.pending.parquet"))
    assert extract(resumed).counts.ok == 12
    assert len(vectors(output)) == 12


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 40 MB, of which the encoder's weights take 34."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(disk)],
        capture_output=True,
        text=True,
    )
    if mounted.returncode:
        pytest.skip(f"no small file system: {mounted.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_full_disk_is_one_line_and_status_2(photos: Path, small_disk: Path) -> None:
    child = start(settings(photos, small_disk / "features", grid=True), own_ray=False)
    _, errors = child.communicate(timeout=300)
    assert child.returncode == 2, errors[-3000:]
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "no space left" in lines[0].lower()
    assert "Traceback" not in errors
    assert not (small_disk / "features" / "manifest.json").exists()


def test_other_views_are_encoded_as_pictures_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for index in range(5):
        (tmp_path / f"photos/{index}.png").write_bytes(draw_scene(0, "train", index))
    output = tmp_path / "out"
    extract(settings(tmp_path / "photos", output, grid=True, mirrored=True, crops=2))
    store = FeatureStore.open(str(output))
    views = ("_mirrored", "_crop1", "_crop2")
    columns = (
        "pooled",
        "grid",
        *(f"{name}{view}" for view in views for name in ("pooled", "grid")),
    )
    table = store.load("test", columns)
    encoder = Encoder.load(store.encoder_weights_uri, store.manifest.encoder.spec)
    fit = store.manifest.encoder.spec.fit
    scenes = [draw_scene(0, "train", index) for index in range(5)]
    pixels = np.stack([load_image(scene, fit).pixels for scene in scenes])
    pictures = {"": pixels, **dict(other_views(pixels, table.image_ids, mirrored=True, crops=2))}
    for view, images in pictures.items():
        pooled, grid = encoder(images, grid=True)
        assert grid is not None
        for name, expected in (("pooled", pooled), ("grid", grid)):
            found = table.columns[f"{name}{view}"].astype(np.float32)
            np.testing.assert_allclose(found, expected.float().numpy(), rtol=2e-3, atol=2e-3)
    assert (store.manifest.mirrored, store.manifest.crops) == (True, 2)


def test_manifest_counts_add_up(tmp_path: Path) -> None:
    from captioner.config import ShapesConfig, SourceConfig

    shapes = ShapesConfig(train=9, validation=5, test=4)
    config = ExtractConfig(
        source="shapes",
        output=str(tmp_path / "features"),
        source_options=SourceConfig(shapes=shapes),
        encoder=EncoderConfig(weights="random", layer="layer3", compute="float32"),
        grid=True,
        batch_size=4,
    )
    manifest = extract(config)
    assert {name: counts.images for name, counts in manifest.splits.items()} == shapes.model_dump(
        include={"train", "validation", "test"}
    )
    assert manifest.counts.ok == manifest.counts.found == 18
    captions = pq.read_table(tmp_path / "features" / "captions")
    assert sum(counts.captions for counts in manifest.splits.values()) == len(captions) == 5 * 18
    store = FeatureStore.open(config.output)
    table = store.load("train", ("pooled", "grid"))
    assert set(store.captions("train")) == set(table.image_ids)
    np.testing.assert_allclose(
        table.columns["grid"].astype(np.float32).mean(axis=1),
        table.columns["pooled"],
        rtol=2e-2,
        atol=2e-3,
    )
    claim = json.loads((tmp_path / "features" / "_job.json").read_text())
    assert claim["encoder"] == manifest.encoder.spec.model_dump(mode="json")
    # Once finished, the directory is left alone, and refused to any other settings.
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "features").rglob("*")}
    assert extract(config) == manifest
    others = {
        r"grid: True there, False asked": {"grid": False},
        r"limits\.max_bytes: \d+ there, 524288 asked": {"limits": LIMITS},
        r"encoder\.weights_sha256: '\w+' there, '\w+' asked": {
            "encoder": config.encoder.model_copy(update={"seed": 1})
        },
        r"source\.options\.\w+: .* there, .* asked": {
            "source_options": SourceConfig(shapes=shapes.model_copy(update={"seed": 1}))
        },
    }
    for message, changes in others.items():
        with pytest.raises(StoreError, match=message):
            extract(config.model_copy(update=changes))
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "features").rglob("*")} == before
