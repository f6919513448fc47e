"""A directory whose job is stopped at each change of its store in turn: the next command ends published, every time."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from captioner import storage
from captioner.artifacts import lease
from captioner.artifacts.manifests import ModelManifest
from captioner.artifacts.output import Output, publish_once
from captioner.errors import StoreError
from tests.s3 import S3Server
from tests.stopping import NEVER, StoppedError, Tickets, stopping_locally, stopping_on_s3

IDENTITY = {"job": "x", "size": 1}
PUBLISHED = {"_job.json": 27, "manifest.json": None, "vocab.json": 2, "features/1.parquet": 4}


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {"BEAT": 100, "LOOK": 0.02, "STALE": 0.1}.items():
        monkeypatch.setattr(lease, name, seconds)


def fill(output: Output) -> ModelManifest:
    storage.write_bytes(output.work("marks", "1"), b"done")
    return ModelManifest(
        files=[output.write("features/1.parquet", b"rows"), output.write("vocab.json", b"[]")]
    )


class Place:
    """Directories, local or in a bucket, that stand still after so many changes."""

    def __init__(self, folder: Path, bucket: str, server: S3Server, store: str):
        self._folder, self._server, self._store = folder, server, store
        self._base = str(folder) if store == "local" else f"{bucket}/{folder.name}"
        self.changes = 0

    def uri(self, stop: int) -> str:
        return f"{self._base}/out-{stop}"

    @contextlib.contextmanager
    def stopping(self, stop: int) -> Iterator[None]:
        tickets = Tickets(self._folder / "tickets", stop)
        with (
            stopping_locally(self._folder / f"out-{stop}", tickets)
            if self._store == "local"
            else stopping_on_s3(self._server, tickets)
        ):
            yield
        self.changes = tickets.taken


@pytest.fixture(params=["local", "s3"])
def place(
    request: pytest.FixtureRequest, tmp_path: Path, bucket: str, s3_server: S3Server
) -> Place:
    return Place(tmp_path, bucket, s3_server, request.param)


def check(uri: str) -> None:
    there = {file.path: file.size for file in storage.list_files(uri)}
    assert there.keys() == PUBLISHED.keys()
    assert {name: PUBLISHED[name] and size for name, size in there.items()} == PUBLISHED


def test_whatever_a_stopped_run_leaves_the_same_command_publishes(place: Place) -> None:
    with place.stopping(NEVER):
        publish_once(place.uri(NEVER), IDENTITY, ModelManifest, fill)
    check(place.uri(NEVER))
    changes = place.changes
    assert changes > 5
    for stop in range(changes):
        # However it fails; the last change, that of tidying, it may not miss.
        with place.stopping(stop), contextlib.suppress(StoppedError, StoreError):
            publish_once(place.uri(stop), IDENTITY, ModelManifest, fill)
        publish_once(place.uri(stop), IDENTITY, ModelManifest, fill)
        check(place.uri(stop))


def test_whatever_a_stopped_restart_leaves_the_next_command_publishes(place: Place) -> None:
    def leave(stop: int) -> str:
        uri = place.uri(stop)
        with Output(uri, {"job": "y"}) as output:
            fill(output)
            output.write("captions/1.parquet", b"of other settings")
        return uri

    uri = leave(NEVER)
    with place.stopping(NEVER):
        publish_once(uri, IDENTITY, ModelManifest, fill, restart=True)
    check(uri)
    # On S3 each takes a second or two.
    for stop in range(0, place.changes, 1 if storage.is_local(uri) else 4):
        uri = leave(stop)
        with place.stopping(stop), contextlib.suppress(StoppedError, StoreError):
            publish_once(uri, IDENTITY, ModelManifest, fill, restart=True)
        publish_once(uri, IDENTITY, ModelManifest, fill, restart=True)
        check(uri)
