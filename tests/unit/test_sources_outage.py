"""Stores that fail while a task reads: what passes is waited for, what does not is told from a bad picture."""

import errno
import io
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from captioner import storage
from captioner.config import ImageLimits
from captioner.errors import OutOfReachError, StoreError
from captioner.sources import open_source
from captioner.sources.outage import patiently
from tests.s3 import Fault, S3Server
from tests.sources import picture, write_images, write_parquet, write_shard

SLOW_DOWN = Fault(503, "SlowDown", "GET HEAD", "outage")
NAMES = [f"{number:02d}.jpg" for number in range(24)]


@pytest.fixture(scope="module")
def photos(bucket: str) -> str:
    for name in NAMES:
        storage.write_bytes(f"{bucket}/outage/{name}", picture(name))
    return f"{bucket}/outage"


@contextmanager
def failing_for(seconds: float, server: S3Server, *faults: Fault) -> Iterator[None]:
    """The server fails from now on, and in the background stops to."""
    server.faults.extend(faults)

    def heal() -> None:
        for fault in faults:
            server.faults.remove(fault)

    timer = threading.Timer(seconds, heal)
    timer.start()
    try:
        yield
    finally:
        timer.join()


def read(source: str, retry_seconds: float) -> list[dict[str, Any]]:
    tasks = open_source(source).images(retry_seconds=retry_seconds).get_read_tasks(1)
    return [row for task in tasks for table in task() for row in table.to_pylist()]


def test_an_outage_that_passes_costs_no_picture(photos: str, s3_server: S3Server) -> None:
    tasks = open_source(photos).images(retry_seconds=60).get_read_tasks(1)
    with failing_for(3, s3_server, SLOW_DOWN):
        rows = [row for task in tasks for table in task() for row in table.to_pylist()]
    assert [(row["image_id"], row["bytes"]) for row in rows] == [
        (name, picture(name)) for name in NAMES
    ]
    assert {row["error"] for row in rows} == {None}


def test_an_outage_that_lasts_is_waited_for_once_by_a_task(
    photos: str, s3_server: S3Server
) -> None:
    tasks = open_source(photos).images(retry_seconds=4).get_read_tasks(1)
    begun = time.monotonic()
    with s3_server.failing(SLOW_DOWN):
        rows = [row for table in tasks[0]() for row in table.to_pylist()]
    assert {row["error_kind"] for row in rows} == {"retryable"}
    assert len({row["error"] for row in rows}) == 1
    assert rows[0]["error"].startswith("cannot be read: AWS Error ")
    # Each try is four requests of the client, and takes it a second or two.
    assert 4 < time.monotonic() - begun < 4 + 15


def test_a_key_that_fails_alone_keeps_no_other_from_being_read(
    photos: str, s3_server: S3Server
) -> None:
    with s3_server.failing(Fault(500, "InternalError", "GET HEAD", "03.jpg")):
        rows = read(photos, 1)
    failed = {row["image_id"]: row["error_kind"] for row in rows if row["error"]}
    assert failed == {"03.jpg": "retryable"}
    assert len(rows) == len(NAMES)


@pytest.mark.parametrize(
    "fault",
    [
        Fault(403, "AccessDenied", "GET HEAD", "03.jpg"),
        Fault(400, "ExpiredToken", "GET HEAD", "03.jpg"),
    ],
    ids=lambda fault: fault.code,
)
def test_denied_access_ends_the_task_at_once_in_one_line(
    photos: str, s3_server: S3Server, fault: Fault
) -> None:
    begun = time.monotonic()
    with s3_server.failing(fault), pytest.raises(StoreError, match=r"03\.jpg.*credentials") as one:
        read(photos, 60)
    assert "\n" not in str(one.value)
    assert one.value.status == 2
    assert time.monotonic() - begun < 10


def test_what_is_gone_since_the_listing_is_final(photos: str, bucket: str) -> None:
    storage.write_bytes(f"{photos}/late.jpg", b"late")
    tasks = open_source(photos).images().get_read_tasks(1)
    boto3.client("s3").delete_object(Bucket="bucket", Key="outage/late.jpg")
    rows = [row for task in tasks for table in task() for row in table.to_pylist()]
    failed = {row["image_id"]: row["error_kind"] for row in rows if row["error"]}
    assert failed == {"late.jpg": "final"}


def test_an_outage_in_the_middle_of_a_slice_repeats_and_loses_no_row(
    bucket: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = [random.Random(number).randbytes(4096) for number in range(200)]
    file = io.BytesIO()
    options = {"use_dictionary": False, "data_page_size": 8192, "write_batch_size": 2}
    pq.write_table(pa.table({"image": pa.array(cells, pa.binary())}), file, **options)
    storage.write_bytes(f"{bucket}/tables/a.parquet", file.getvalue())
    # Small reads and tables, so that the fault meets one in the middle.
    monkeypatch.setattr("captioner.sources.parquet_rows._READ_BUFFER", 4096)
    monkeypatch.setattr("captioner.sources.parquet_rows.BYTES_PER_TABLE", 10 * 4096)
    tasks = open_source(f"{bucket}/tables").images(retry_seconds=60).get_read_tasks(1)
    fault = Fault(503, "SlowDown", "GET HEAD", "a.parquet")
    rows: list[dict[str, Any]] = []
    for number, table in enumerate(tasks[1]()):
        rows += table.to_pylist()
        if number == 2:
            s3_server.faults.append(fault)
            begun = time.monotonic()
            threading.Timer(2, s3_server.faults.remove, [fault]).start()
    assert time.monotonic() - begun > 2
    assert len({row["image_id"] for row in rows}) == len(rows) == tasks[1].metadata.num_rows
    first = tasks[0].metadata.num_rows or 0
    assert [row["bytes"] for row in rows] == cells[first:]


class Failing(pafs.FileSystemHandler):
    """A local folder of which the first file fails so many times."""

    def __init__(self, error: int, times: int):
        self.error, self.left = error, times

    def open_input_file(self, path: str) -> pa.PythonFile:
        if path.endswith("a.jpg") and self.left:
            self.left -= 1
            raise OSError(self.error, "injected")
        return pa.PythonFile(io.BytesIO(Path(path).read_bytes()), "r")

    def _absent(self, *_: object, **__: object) -> Any:
        raise NotImplementedError

    def get_file_info(self, paths: list[str]) -> list[pafs.FileInfo]:
        return [pafs.FileInfo(path, pafs.FileType.Directory) for path in paths]

    get_type_name = normalize_path = get_file_info_selector = create_dir = _absent
    delete_dir = delete_dir_contents = delete_root_dir_contents = delete_file = move = _absent
    copy_file = open_input_stream = open_output_stream = open_append_stream = _absent


@pytest.mark.parametrize(
    ("error", "times", "kind"),
    [
        (errno.EIO, 2, None),
        (errno.ESTALE, 2, None),
        (errno.ETIMEDOUT, 2, None),
        (errno.EIO, 1000, "retryable"),
        (errno.EACCES, 1, "final"),
        (errno.ENOENT, 1, "final"),
    ],
    ids=lambda value: errno.errorcode.get(value, value) if isinstance(value, int) else value,
)
def test_faults_of_a_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int, times: int, kind: str | None
) -> None:
    write_images(tmp_path, "a.jpg", "b.jpg")
    source = open_source(str(tmp_path))
    filesystem = pafs.PyFileSystem(Failing(error, times))
    monkeypatch.setattr(
        "captioner.sources.folder.storage.resolve", lambda uri: (filesystem, str(tmp_path))
    )
    (task,) = source.images(retry_seconds=1).get_read_tasks(1)
    rows = {row["image_id"]: row for table in task() for row in table.to_pylist()}
    assert rows["a.jpg"]["error_kind"] == kind
    assert (rows["a.jpg"]["bytes"] is None) == (kind is not None)
    assert rows["b.jpg"]["bytes"] == picture("b.jpg")


def test_what_cannot_be_listed_now_is_not_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path, "a.jpg", "below/b.jpg")
    listed = os.listdir

    def stale(path: bytes) -> Any:
        if path.endswith(b"below"):
            raise OSError(errno.ESTALE, "injected")
        return listed(path)

    monkeypatch.setattr("captioner.sources.listing.os.listdir", stale)
    with pytest.raises(OutOfReachError, match=f"cannot list {tmp_path}/below: "):
        open_source(str(tmp_path))


@pytest.mark.parametrize("mounted", ["below", "there"])
@pytest.mark.parametrize("kind", ["folder", "parquet", "shards"])
def test_a_disk_that_goes_is_no_fault_of_its_pictures(
    tmp_path: Path, kind: str, mounted: str
) -> None:
    disk = tmp_path / "disk"
    if kind == "folder":
        write_images(disk, "a.jpg", "b.jpg")
    elif kind == "parquet":
        write_parquet(disk / "a.parquet", 2)
    else:
        write_shard(disk / "a.tar", {"a.jpg": b"1", "b.jpg": b"2"})
    (task,) = open_source(str(disk)).images(retry_seconds=0).get_read_tasks(1)
    disk.rename(tmp_path / "gone")
    if mounted == "there":
        disk.mkdir()
    rows = [row for table in task() for row in table.to_pylist()]
    assert len(rows) == 2
    assert {row["error_kind"] for row in rows} == {"retryable"}
    assert {row["error"] for row in rows} == {f"cannot be read: {tmp_path}/disk is gone"}


def test_tables_that_cannot_be_opened_now_are_out_of_reach(
    bucket: str, s3_server: S3Server, tmp_path: Path
) -> None:
    write_parquet(tmp_path / "a.parquet", 5, captions="caption")
    storage.write_bytes(f"{bucket}/opened/a.parquet", (tmp_path / "a.parquet").read_bytes())
    # The size is known, what is in it not.
    with (
        s3_server.failing(Fault(503, "SlowDown", "GET", "opened/a")),
        pytest.raises(OutOfReachError, match="AWS Error"),
    ):
        open_source(f"{bucket}/opened")


@pytest.mark.parametrize("beside", ["a.jpg", "a.tar"])
def test_a_table_beside_pictures_that_cannot_be_read_now_is_out_of_reach(
    bucket: str, s3_server: S3Server, tmp_path: Path, beside: str
) -> None:
    place = f"{bucket}/{beside.replace('.', '_')}"
    write_shard(tmp_path / "a.tar", {"1.jpg": b"1"})
    storage.write_bytes(f"{place}/a.jpg", picture("a.jpg"))
    if beside == "a.tar":
        storage.delete(f"{place}/a.jpg")
        storage.write_bytes(f"{place}/a.tar", (tmp_path / "a.tar").read_bytes())
    pq.write_table(pa.table({"key": ["1"], "status": ["success"]}), tmp_path / "a.parquet")
    storage.write_bytes(f"{place}/a.parquet", (tmp_path / "a.parquet").read_bytes())
    assert open_source(place).num_images() == 1
    with (
        s3_server.failing(Fault(503, "SlowDown", "GET", "a.parquet")),
        pytest.raises(OutOfReachError, match="AWS Error"),
    ):
        open_source(place)


def test_a_file_that_has_grown_beyond_the_limit_is_not_read(tmp_path: Path) -> None:
    write_images(tmp_path, "a.jpg", "b.jpg")
    source = open_source(str(tmp_path), limits=ImageLimits(max_bytes=100))
    (task,) = source.images().get_read_tasks(1)
    with open(tmp_path / "a.jpg", "wb") as file:
        file.truncate(2**40)
    a, b = (row for table in task() for row in table.to_pylist())
    assert (a["bytes"], a["error"]) == (None, f"{2**40} bytes, over the limit of 100")
    assert b["bytes"] == picture("b.jpg")


def test_a_file_with_fewer_rows_than_it_had_ends(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", 50, captions=None)
    (task,) = open_source(str(tmp_path)).images().get_read_tasks(1)
    write_parquet(tmp_path / "a.parquet", 40, captions=None)
    assert sum(map(len, task())) == 40


def test_what_is_out_of_reach_is_asked_for_again_for_a_while() -> None:
    def answer_after(tries: int) -> Callable[[], str]:
        left = iter(range(tries))

        def call() -> str:
            if next(left, None) is not None:
                raise OutOfReachError("not now")
            return "here"

        return call

    assert patiently(30, answer_after(2)) == "here"
    with pytest.raises(OutOfReachError, match="not now"):
        patiently(0.5, answer_after(1000))
