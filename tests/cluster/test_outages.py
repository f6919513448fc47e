"""Jobs that read from a store that fails: what passes costs nothing, what lasts the same command does later."""

import csv
import io
import threading
import time
from collections import Counter
from collections.abc import Iterator

import pyarrow.parquet as pq
import pytest
import ray

from captioner import storage
from captioner.captioning.collection import caption_collection
from captioner.config import CaptionConfig, DecodeOverrides, EncoderConfig, ExtractConfig
from captioner.errors import OutOfReachError, SourceError, StoreError
from captioner.features.extract import extract
from captioner.runtime.cluster import start_local_ray
from tests.models import write_model
from tests.pictures import picture
from tests.s3 import Fault, S3Server

pytestmark = [pytest.mark.usefixtures("ray_beside_s3"), pytest.mark.timeout(600)]

NAMES = [f"{number:02d}.png" for number in range(24)]
LOST = NAMES[5:8]
SLOW_DOWN = Fault(503, "SlowDown", "GET HEAD", r"photos/(05|06|07)\.png")


@pytest.fixture(scope="module")
def ray_beside_s3(bucket: str) -> Iterator[None]:
    """Whose workers have credentials for the server."""
    ray.shutdown()
    start_local_ray(num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def photos(bucket: str) -> str:
    for number, name in enumerate(NAMES):
        storage.write_bytes(f"{bucket}/photos/{name}", picture(number, "PNG"))
    return f"{bucket}/photos"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("models") / "words")


def captions(images: str, model: str, output: str, **changes: object) -> CaptionConfig:
    base = {
        "images": images,
        "model": model,
        "output": output,
        "decode": DecodeOverrides(max_length=4),
        "retry_seconds": 2,
    }
    return CaptionConfig.model_validate(base | changes)


def features(source: str, output: str, **changes: object) -> ExtractConfig:
    encoder = EncoderConfig(weights="random", layer="layer3", compute="float32")
    base = {"source": source, "output": output, "encoder": encoder}
    return ExtractConfig.model_validate(base | changes)


def read_rejects(output: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(storage.read_bytes(f"{output}/rejects.csv").decode())))


def test_what_cannot_be_read_is_left_and_the_same_command_does_just_that(
    photos: str, model: str, bucket: str, s3_server: S3Server
) -> None:
    config = captions(photos, model, f"{bucket}/captions")
    with s3_server.failing(SLOW_DOWN), pytest.raises(OutOfReachError) as one:
        caption_collection(config)
    assert one.value.status == 75
    assert str(one.value).startswith("3 of 24 images could not be read, 0")
    assert "\n" not in str(one.value)
    assert not storage.exists(f"{config.output}/manifest.json")
    before = len(s3_server.requests)
    manifest = caption_collection(config)
    assert (manifest.counts.ok, manifest.counts.images) == (24, 24)
    asked = Counter(request for request in s3_server.requests[before:] if "photos/" in request)
    read = {name for name in NAMES if asked[f"GET /bucket/photos/{name}"]}
    assert read == set(LOST)
    rows = [row for entry in manifest.tables("captions") for row in read_table(config, entry.path)]
    assert sorted(row["image_id"] for row in rows) == NAMES
    assert all(row["caption"] is not None for row in rows)


def read_table(config: CaptionConfig | ExtractConfig, path: str) -> list[dict[str, object]]:
    data = storage.read_bytes(f"{config.output}/{path}")
    found: list[dict[str, object]] = pq.read_table(io.BytesIO(data)).to_pylist()
    return found


def test_unreadable_images_are_published_where_that_is_accepted(
    photos: str, bucket: str, s3_server: S3Server
) -> None:
    # Everything is away for three seconds, which costs nothing, and three images for good.
    away = Fault(503, "SlowDown", "GET HEAD", r"photos/\d")
    config = features(
        photos,
        f"{bucket}/features",
        retry_seconds=10,
        accept_unreadable=True,
        max_reject_fraction=0.2,
    )
    s3_server.faults.append(away)

    def come_back() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not any(
            ".png" in one for one in s3_server.requests[before:]
        ):
            time.sleep(0.1)
        time.sleep(3)
        s3_server.faults.remove(away)

    before = len(s3_server.requests)
    thread = threading.Thread(target=come_back)
    thread.start()
    with s3_server.failing(SLOW_DOWN):
        manifest = extract(config)
    thread.join()
    counts = manifest.counts
    assert (counts.ok, counts.rejected, counts.unreadable) == (21, 0, 3)
    rows = [row for entry in manifest.tables("features") for row in read_table(config, entry.path)]
    assert sorted(str(row["image_id"]) for row in rows) == NAMES
    kinds = {row["image_id"]: row["error_kind"] for row in rows if row["error"]}
    assert kinds == dict.fromkeys(LOST, "retryable")
    listed = read_rejects(config.output)
    assert [(row["image_id"], row["error_kind"]) for row in listed] == [
        (name, "retryable") for name in LOST
    ]
    assert listed[0]["uri"] == f"{photos}/05.png"
    assert "rejects.csv" in {entry.path for entry in manifest.files}


def test_denied_access_ends_the_job_at_once_in_one_line(
    photos: str, bucket: str, s3_server: S3Server
) -> None:
    denied = Fault(403, "AccessDenied", "GET HEAD", r"photos/11\.png")
    begun = time.monotonic()
    with s3_server.failing(denied), pytest.raises(StoreError, match="credentials") as one:
        extract(features(photos, f"{bucket}/denied"))
    assert str(one.value).startswith(f"cannot read {photos}/11.png: ")
    assert "\n" not in str(one.value)
    assert "retried_io_errors" not in str(one.value)
    assert time.monotonic() - begun < 60


def test_captioning_in_which_every_picture_failed_is_a_failure(
    model: str, bucket: str, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(3):
        storage.write_bytes(f"{bucket}/texts/{number}.jpg", b"no picture")
    config = captions(f"{bucket}/texts", model, f"{bucket}/none")
    caplog.set_level("INFO", "captioner")
    with pytest.raises(SourceError, match=r"^3 of 3 images were rejected, .* 0\.5: 3 rejected: "):
        caption_collection(config)
    assert "3 rejected: not a " in caplog.text
    assert not storage.exists(f"{config.output}/manifest.json")
    assert [row["image_id"] for row in read_rejects(config.output)] == ["0.jpg", "1.jpg", "2.jpg"]
    manifest = caption_collection(config.model_copy(update={"max_reject_fraction": 1.0}))
    assert (manifest.counts.ok, manifest.counts.rejected) == (0, 3)
