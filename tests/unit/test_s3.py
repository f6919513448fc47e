"""What is promised of object stores, on a server that speaks S3's protocol."""

import boto3
import pytest

from captioner import storage
from captioner.artifacts.feature_store import FeatureStore
from captioner.artifacts.manifests import FileEntry, ModelManifest, open_manifest
from captioner.artifacts.output import Output
from captioner.errors import StoreError
from tests import odd
from tests.s3 import Fault, S3Server


def test_of_two_writers_one_publishes(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("captioner.artifacts.output.take", lambda *_: None)
    first, second = (Output(f"{bucket}/contested", {"job": "x"}) for _ in range(2))
    first.publish(ModelManifest(files=[FileEntry(path="1", bytes=1)]))
    with pytest.raises(StoreError, match="another run published first"):
        second.publish(ModelManifest(files=[FileEntry(path="2", bytes=1)]))
    published = open_manifest(f"{bucket}/contested", ModelManifest)
    assert [entry.path for entry in published.files] == ["1"]
    assert Output(f"{bucket}/contested", {"job": "x"}).complete


def test_missing_bucket_is_one_line(bucket: str) -> None:
    with pytest.raises(StoreError) as one:
        FeatureStore.open("s3://no-such-bucket/features")
    assert "\n" not in str(one.value)


def test_a_page_of_somebody_elses_is_no_answer(bucket: str, s3_server: S3Server) -> None:
    storage.write_bytes(f"{bucket}/paged/a.jpg", b"x")
    page = "<html><title>Welcome</title></html>"
    for act, methods in (
        (lambda: storage.create_exclusively(f"{bucket}/paged/b", b"x"), "PUT"),
        (lambda: list(storage.iter_files(f"{bucket}/paged")), "GET"),
    ):
        with (
            s3_server.failing(Fault(200, "OK", methods, body=page)),
            pytest.raises(StoreError, match="what answers is no S3") as one,
        ):
            act()
        assert "\n" not in str(one.value)


def test_failed_write_leaves_no_object(bucket: str) -> None:
    uri = f"{bucket}/half/data.bin"
    with pytest.raises(StoreError, match="injected"), storage.atomic_writer(uri) as file:  # noqa: PT012
        file.write(b"half")
        raise OSError("injected")
    # What boto3, not pyarrow, finds.
    assert "Contents" not in boto3.client("s3").list_objects_v2(Bucket="bucket", Prefix="half/")


# The server's own router knows no line breaks.
@pytest.mark.parametrize("name", [name for name in odd.NAMES if "\n" not in name])
def test_a_key_is_taken_as_it_is(bucket: str, name: str) -> None:
    odd.check(f"{bucket}/{name}/{name}")
    found = boto3.client("s3").list_objects_v2(Bucket="bucket", Prefix=f"{name}/{name}/")
    assert f"{name}/{name}/{name}" in [entry["Key"] for entry in found["Contents"]]


def test_a_listing_page_by_page_is_the_whole_one(bucket: str) -> None:
    client, names = boto3.client("s3"), [f"{number:04d} ü+%.jpg" for number in range(1100)]
    for name in [*names, "folder/", "folder/a//b.jpg"]:
        client.put_object(Bucket="bucket", Key=f"many/{name}", Body=b"x")
    found = list(storage.iter_files(f"{bucket}/many"))
    assert [file.path for file in found] == [*names, "folder/a//b.jpg"]
    whole = storage.list_files(f"{bucket}/many")
    assert found[:1100] == [file for file in whole if "folder" not in file.path]
    assert list(storage.iter_files(f"{bucket}/nothing")) == []
    with pytest.raises(StoreError) as one:
        list(storage.iter_files("s3://no-such-bucket/photos"))
    assert "\n" not in str(one.value)
