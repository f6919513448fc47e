"""New versions on the GPUs there are, and GPUs that come later than the service; their GPUs are logical ones."""

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from captioner.artifacts.model_directory import open_model
from captioner.serving.guard import GuardSettings
from captioner.serving.proxy import CALLBACK, CALLBACK_PATH, SETTINGS
from tests.head import RAY, ROOT, Head, free_port, ray_head
from tests.pictures import picture
from tests.serve.conftest import ARGS
from tests.serve.service import Service
from tests.serve.test_service import Load

pytestmark = [pytest.mark.timeout(900), pytest.mark.chaos]

VARIABLES = {
    CALLBACK: CALLBACK_PATH,
    SETTINGS: GuardSettings().model_dump_json(),
    "PYTHONPATH": str(ROOT),
}
Deploy = Callable[[Head, dict[str, Any]], None]


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def deploy(port: int, tmp_path: Path) -> Deploy:
    """``serve deploy`` of the configuration in ``deploy/rayservice.yaml`` with other arguments."""

    def run(head: Head, args: dict[str, Any]) -> None:
        manifest = next(yaml.safe_load_all((ROOT / "deploy/rayservice.yaml").read_text()))
        config = yaml.safe_load(manifest["spec"]["serveConfigV2"])
        config["http_options"] |= {"host": "127.0.0.1", "port": port}
        config["applications"][0]["args"] |= {"threads": 1, "http_replicas": 1} | args
        file = tmp_path / "serve.yaml"
        file.write_text(yaml.safe_dump(config))
        command = [str(RAY.with_name("serve")), "deploy", "-a", head.dashboard, str(file)]
        done = subprocess.run(command, env=head.environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    return run


def test_versions_follow_each_other_on_one_gpu_without_a_failed_request(
    models: dict[str, str], deploy: Deploy, port: int, tmp_path: Path
) -> None:
    def args(version: str, names: list[str], replicas: int) -> dict[str, Any]:
        scale = {"min_replicas": replicas, "max_replicas": replicas}
        takes = {"gpus_per_replica": None, "cpus_per_replica": None}  # as without the manifest
        uris = [f"{name}={models[version]}" for name in names]
        return {**scale, **takes, "request_timeout_s": ARGS["request_timeout_s"], "model": uris}

    with ray_head(tmp_path, VARIABLES, jobs=False, gpus=1) as head:
        deploy(head, args("v1", ["a"], 1))
        service = Service(f"http://127.0.0.1:{port}", head.pid)
        service.wait_until_ready()
        load = Load(service)

        def roll_out() -> None:
            for version, names, replicas in (("v2", ["a"], 3), ("v1", ["a", "b"], 1)):
                load.wait(answers=8)
                deploy(head, args(version, names, replicas))
                wanted = open_model(models[version]).version[:12]
                deadline = time.monotonic() + 300
                while any(versions(service, name) != {wanted} for name in names):
                    assert time.monotonic() < deadline, applications(head)
                # With the last replica of the new version all of the old one are gone.
                while any(len(service.replicas(f"model-{name}")) != replicas for name in names):
                    assert time.monotonic() < deadline, applications(head)
                    time.sleep(1)

        asyncio.run(load.during(roll_out))
        assert load.broken == []
        assert load.statuses.keys() == {200}


def test_replicas_wait_for_a_gpu_that_comes_late(
    models: dict[str, str], deploy: Deploy, port: int, tmp_path: Path
) -> None:
    with ray_head(tmp_path, VARIABLES, jobs=False, cpus=0) as head:
        deploy(head, {"model": [f"words={models['v1']}"], "cpus_per_replica": 1})
        (first,) = seen(head, lambda found: found["proxies"])
        seen(head, lambda found: replicas_of(found, "model-words"))
        time.sleep(10)
        (waiting,) = replicas_of(applications(head), "model-words")
        assert (waiting["state"], waiting.get("node_id")) == ("STARTING", None)
        with gpu_node(head, tmp_path):
            service = Service(f"http://127.0.0.1:{port}", head.pid)
            service.wait_until_ready()
            (replica,) = replicas_of(applications(head), "model-words")
            assert (replica["state"], replica["node_id"] != first) == ("RUNNING", True)


def versions(service: Service, model: str) -> set[str]:
    """Those that answer for a model now; none that is new and not there yet."""
    answers = [service.caption(picture(number), model=model) for number in range(8)]
    return {answer.json().get("version", "") for answer in answers}


def applications(head: Head) -> dict[str, Any]:
    """What Ray Serve says of itself."""
    headers = {"Authorization": f"Bearer {head.environment['RAY_AUTH_TOKEN']}"}
    answer = httpx.get(f"{head.dashboard}/api/serve/applications/", headers=headers, timeout=60)
    found: dict[str, Any] = answer.json()
    return found


def replicas_of(found: dict[str, Any], deployment: str) -> list[dict[str, Any]]:
    deployments = found["applications"].get("captioner", {}).get("deployments", {})
    replicas: list[dict[str, Any]] = deployments.get(deployment, {}).get("replicas", [])
    return replicas


def seen(head: Head, what: Callable[[dict[str, Any]], Any]) -> Any:
    """What is there, once something is."""
    deadline = time.monotonic() + 120
    while not (found := what(applications(head))):
        assert time.monotonic() < deadline
        time.sleep(1)
    return found


@contextmanager
def gpu_node(head: Head, folder: Path) -> Iterator[None]:
    """A second node, with a logical GPU."""
    command = [
        str(RAY), "start", "--block", f"--address={head.address}", "--node-ip-address=127.0.0.1",
        "--num-cpus=2", "--num-gpus=1", "--object-store-memory=200000000",
        f"--dashboard-agent-listen-port={free_port()}",
    ]  # fmt: skip
    with (folder / "node.log").open("wb") as output:
        node = subprocess.Popen(
            command,
            env=head.environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield
    finally:
        os.killpg(node.pid, signal.SIGKILL)
        node.wait()
