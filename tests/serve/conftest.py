"""One service for the whole directory: two tiny models on a real Ray head, deployed from the shipped configuration."""

import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import boto3
import pytest
import yaml
from moto.server import ThreadedMotoServer

from captioner import storage
from captioner.serving.guard import GuardSettings
from captioner.serving.proxy import CALLBACK, CALLBACK_PATH, SETTINGS
from tests.head import RAY, ROOT, Head, free_port, ray_head
from tests.models import write_model
from tests.serve.service import Service

# Small enough to reach in a test.
ARGS = {
    "limits": {"max_bytes": 400_000, "max_pixels": 4_000_000},
    "max_request_bytes": 1_000_000,
    "upload_timeout_s": 3.0,
    # A replica that takes the place of a killed one needs a minute on a busy machine, and requests wait for it.
    "request_timeout_s": 200.0,
    "max_batch_size": 8,
    "max_queued": 24,
    "threads": 1,
}


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two versions of a model, and one that says where it looks."""
    root = tmp_path_factory.mktemp("models")
    return {
        "v1": write_model(root / "v1", "merge", 0),
        "v2": write_model(root / "v2", "merge", 1),
        "places": write_model(root / "places", "spatial_attention", 0, grid=(3, 5)),
    }


@pytest.fixture(scope="session")
def bucket(models: dict[str, str]) -> Iterator[tuple[str, dict[str, str]]]:
    """An S3 bucket that holds ``places``, and the variables by which its clients find it."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    variables = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="models")
        for file in storage.list_files(models["places"]):
            storage.copy_file(file.uri, f"s3://models/places/{file.path}")
    yield "s3://models", variables
    server.stop()


@pytest.fixture(scope="session")
def head(
    tmp_path_factory: pytest.TempPathFactory, bucket: tuple[str, dict[str, str]]
) -> Iterator[Head]:
    shared = {name: ARGS[name] for name in ("max_request_bytes", "upload_timeout_s")}
    guard = GuardSettings(**shared)  # type: ignore[arg-type]
    variables = {CALLBACK: CALLBACK_PATH, SETTINGS: guard.model_dump_json(), **bucket[1]}
    variables["PYTHONPATH"] = str(ROOT)
    variables["RAY_metrics_report_interval_ms"] = "1000"
    # Two versions of two models share the GPU while one follows the other.
    with ray_head(tmp_path_factory.mktemp("head"), variables, jobs=False, gpus=1) as found:
        yield found


@pytest.fixture(scope="session")
def deploy(
    head: Head, bucket: tuple[str, dict[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], int]:
    """``serve deploy`` of the shipped configuration with the model at a URI as ``words``; returns the port."""
    port = free_port()
    file = tmp_path_factory.mktemp("deploy") / "serve.yaml"

    def run(uri: str) -> int:
        config: dict[str, Any] = yaml.safe_load((ROOT / "deploy/serve.yaml").read_text())
        config["http_options"]["port"] = port
        application = config["applications"][0]
        application["args"] = ARGS | {"model": [f"words={uri}", f"places={bucket[0]}/places"]}
        file.write_text(yaml.safe_dump(config))
        command = [str(RAY.with_name("serve")), "deploy", "-a", head.dashboard, str(file)]
        done = subprocess.run(command, env=head.environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return port

    return run


@pytest.fixture(scope="session")
def service(head: Head, deploy: Callable[[str], int], models: dict[str, str]) -> Service:
    port = deploy(models["v1"])
    found = Service(f"http://127.0.0.1:{port}", head.pid)
    found.wait_until_ready()
    return found
