"""Two runs of one command on S3: one works, the other waits, and goes on where the first is gone."""

import json
import logging
import threading
import time

import pytest

from captioner import storage
from captioner.artifacts import lease
from captioner.artifacts.manifests import ModelManifest, open_manifest
from captioner.artifacts.output import WORK, Output, publish_once
from captioner.errors import OutOfReachError, StoreError
from captioner.storage.exclusive import get, put
from tests.s3 import Fault, S3Server

IDENTITY = {"job": "extract_features"}


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {"BEAT": 0.1, "LOOK": 0.05, "STALE": 1.0}.items():
        monkeypatch.setattr(lease, name, seconds)


@pytest.fixture
def root(bucket: str, request: pytest.FixtureRequest) -> str:
    return f"{bucket}/{request.node.name}"


def fill(output: Output) -> ModelManifest:
    return ModelManifest(files=[output.write("vocab.json", b"[]")])


def in_another_thread(output: str, *, work: float) -> threading.Thread:
    """A run of the command that takes so many seconds; it has the directory when this returns."""
    begun = threading.Event()

    def run(claimed: Output) -> ModelManifest:
        begun.set()
        time.sleep(work)
        return fill(claimed)

    thread = threading.Thread(target=publish_once, args=(output, IDENTITY, ModelManifest, run))
    thread.start()
    assert begun.wait(10)
    return thread


def test_the_second_names_owner_and_job_while_the_first_works(
    root: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    submitted = json.dumps({"metadata": {"job_submission_id": "raysubmit_1"}})
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", submitted)
    first = in_another_thread(root, work=6)
    with pytest.raises(
        OutOfReachError,
        match=r"extract_features, job raysubmit_1, process \d+ of \S+ on \S+, since",
    ) as one:
        publish_once(root, IDENTITY, ModelManifest, pytest.fail)
    assert "\n" not in str(one.value)
    assert "looking up to 1 s whether it lives" in caplog.text
    first.join()
    assert publish_once(root, IDENTITY, ModelManifest, pytest.fail).files


def test_the_second_ends_with_the_result_that_the_first_publishes_meanwhile(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "BEAT", 100)
    monkeypatch.setattr(lease, "STALE", 100)
    first = in_another_thread(root, work=0.5)
    assert publish_once(root, IDENTITY, ModelManifest, pytest.fail).files
    first.join()


def test_a_dead_owner_is_outlasted_and_a_released_lease_taken_at_once(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = {"job": "x", "lease": "0", "beat": 1, "released": False}
    with Output(root, IDENTITY):
        pass
    place = f"{root}/{WORK}/lease"
    with monkeypatch.context() as patch:
        patch.setattr(lease, "STALE", 1000)
        with Output(root, IDENTITY) as output:
            assert output.resumed
    storage.write_bytes(place, json.dumps(dead).encode())
    started = time.monotonic()
    publish_once(root, IDENTITY, ModelManifest, fill)
    assert time.monotonic() - started >= 1
    assert not [f.path for f in storage.list_files(root) if f.path.startswith(WORK)]


def test_whoever_has_lost_the_directory_stops(root: str) -> None:
    """As after a laptop's sleep: another run has taken over, and the first learns it at its next beat."""

    def lose(output: Output) -> ModelManifest:
        there = get(output.work("lease"))
        assert there is not None
        put(output.work("lease"), b'{"released": false}', there[1])
        time.sleep(20)
        raise AssertionError("it worked on")

    started = time.monotonic()
    with pytest.raises(OutOfReachError, match="is being written by another process"):
        publish_once(root, IDENTITY, ModelManifest, lose)
    assert time.monotonic() - started < 10


def test_nothing_is_written_over_another_run_that_has_taken_over(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "BEAT", 100)
    monkeypatch.setattr(lease, "STALE", -1)  # every check asks the store
    output = Output(root, IDENTITY)
    there = get(output.work("lease"))
    assert there is not None
    put(output.work("lease"), b'{"released": false}', there[1])
    with pytest.raises(OutOfReachError, match="is being written by another process"):
        output.write("vocab.json", b"late")
    assert not storage.exists(f"{root}/vocab.json")
    output.close()


def test_an_outage_loses_no_directory(root: str, s3_server: S3Server) -> None:
    with Output(root, IDENTITY) as output:
        with s3_server.failing(Fault(503, "SlowDown")):
            time.sleep(1)
        time.sleep(1)
        output.publish(ModelManifest(files=[]))
    assert open_manifest(root, ModelManifest).files == []


@pytest.mark.parametrize(
    "fault",
    [
        Fault(501, "NotImplemented", "PUT", conditional=True),
        Fault(200, "ignored", "PUT", conditional=True),
    ],
)
def test_without_conditional_writes_one_line_says_what_that_means(
    root: str, s3_server: S3Server, fault: Fault, caplog: pytest.LogCaptureFixture
) -> None:
    with s3_server.failing(fault):
        publish_once(root, IDENTITY, ModelManifest, fill)
        lines = [r.message for r in caplog.records if "run one at a time" in r.message]
        assert lines
        assert all("\n" not in line for line in lines)
        with pytest.raises(StoreError, match="was made by another run"):
            publish_once(root, {"job": "other"}, ModelManifest, fill)
