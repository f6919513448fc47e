"""The manifests for KubeRay and the image they name, as far as they can be checked without a Kubernetes.

The field names are those of KubeRay's published API reference; Serve's part is parsed by Ray itself, the entry
point by the job's own command line.
"""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray.serve.schema import ServeDeploySchema

from captioner.config import ExtractConfig, ServeConfig
from captioner.runtime import command_line
from captioner.serving import proxy
from captioner.serving.guard import GuardSettings
from captioner.serving.tokens import TOKENS

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = {"rayVersion", "authOptions", "gcsFaultToleranceOptions", "enableInTreeAutoscaling",
           "autoscalerOptions", "headGroupSpec", "workerGroupSpecs"}  # fmt: skip
WORKERS = {"groupName", "minReplicas", "replicas", "maxReplicas", "rayStartParams", "template"}
POD = {
    "serviceAccountName",
    "terminationGracePeriodSeconds",
    "securityContext",
    "containers",
    "volumes",
}
CONTAINER = {"name", "image", "env", "lifecycle", "securityContext", "resources", "volumeMounts"}
FIELDS = {
    "RayJob": {"entrypoint", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "backoffLimit",
               "rayClusterSpec"},
    "RayService": {"upgradeStrategy", "serveConfigV2", "rayClusterConfig"},
}  # fmt: skip


def load(name: str) -> dict[str, Any]:
    """The first document of a manifest."""
    found: dict[str, Any] = next(yaml.safe_load_all((ROOT / "deploy" / name).read_text()))
    return found


def cluster_of(manifest: dict[str, Any]) -> dict[str, Any]:
    spec = manifest["spec"]
    found: dict[str, Any] = spec.get("rayClusterSpec") or spec["rayClusterConfig"]
    return found


@pytest.mark.parametrize("name", ["rayjob.yaml", "rayservice.yaml"])
def test_manifest_has_known_fields_and_safe_pods(name: str) -> None:
    manifest = load(name)
    assert manifest["apiVersion"] == "ray.io/v1"
    assert manifest["spec"].keys() == FIELDS[manifest["kind"]]
    cluster = cluster_of(manifest)
    assert cluster.keys() | {"gcsFaultToleranceOptions"} == CLUSTER
    assert cluster["rayVersion"] == ray.__version__
    assert cluster["authOptions"] == {"mode": "token", "secretName": "captioner-ray-token"}
    head, workers = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    # No service of another type: nothing is reachable from outside the cluster.
    assert head.keys() == {"rayStartParams", "template"}
    assert head["rayStartParams"]["num-cpus"] == "0"
    for group in workers:
        assert group.keys() == WORKERS
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in [head, *workers]:
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        assert group["template"].keys() | {"metadata"} == {"metadata", "spec"}
        pod = group["template"]["spec"]
        assert pod.keys() <= POD
        assert pod["securityContext"]["runAsNonRoot"] is True
        volumes = {volume["name"] for volume in pod.get("volumes", [])}
        for container in pod["containers"]:
            assert container.keys() <= CONTAINER
            assert container["image"] == f"captioner:{ray.__version__}"
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            # Ray takes its resources from the limits.
            assert container["resources"]["requests"] == container["resources"]["limits"]
            assert {mount["name"] for mount in container.get("volumeMounts", [])} == volumes
            for variable in container.get("env", []):
                secret = re.search("TOKEN|SECRET|KEY", variable["name"])
                assert ("valueFrom" in variable) == bool(secret)


def test_job_is_one_that_parses() -> None:
    python, option, module, *arguments = shlex.split(load("rayjob.yaml")["spec"]["entrypoint"])
    assert (python, option, module) == ("python", "-m", "ray_jobs.extract_features")
    assert command_line.parse(ExtractConfig, arguments).output.startswith("s3://")


def test_service_is_one_that_ray_serve_and_the_application_accept() -> None:
    config = ServeDeploySchema.model_validate(
        yaml.safe_load(load("rayservice.yaml")["spec"]["serveConfigV2"])
    )
    ServeConfig.model_validate(config.applications[0].args)
    assert config.applications[0].import_path == "captioner.serving.build:build_app"
    # The proxies' guard is what keeps a service that listens for its pods' network behind tokens.
    for group in cluster_of(load("rayservice.yaml"))["workerGroupSpecs"]:
        variables = {
            variable["name"]: variable.get("value")
            for variable in group["template"]["spec"]["containers"][0]["env"]
        }
        assert variables.keys() == {proxy.CALLBACK, proxy.SETTINGS, TOKENS}
        assert variables[proxy.CALLBACK] == proxy.CALLBACK_PATH
        guard = GuardSettings.model_validate_json(variables[proxy.SETTINGS])
        assert guard.max_connections_per_address == guard.max_connections


def test_two_versions_of_the_service_fit_its_workers_and_none_fits_the_head() -> None:
    manifest = load("rayservice.yaml")
    config = ServeDeploySchema.model_validate(yaml.safe_load(manifest["spec"]["serveConfigV2"]))
    args = ServeConfig.model_validate(config.applications[0].args)
    [group] = cluster_of(manifest)["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    for each, most in (
        (args.gpus_per_replica, int(limits["nvidia.com/gpu"])),
        (args.cpus_per_replica, int(limits["cpu"])),
    ):
        assert each is not None
        assert each > 0
        per_node = int(most / each)
        assert per_node * group["maxReplicas"] >= 2 * len(args.models) * args.max_replicas


def test_pods_of_the_service_end_when_their_requests_have() -> None:
    manifest, budget = yaml.safe_load_all((ROOT / "deploy/rayservice.yaml").read_text())
    config = ServeDeploySchema.model_validate(yaml.safe_load(manifest["spec"]["serveConfigV2"]))
    args = ServeConfig.model_validate(config.applications[0].args)
    longest = args.upload_timeout_s + args.request_timeout_s + 5
    cluster = cluster_of(manifest)
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        [_, seconds] = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        assert longest < int(seconds) < pod["terminationGracePeriodSeconds"]
    assert (budget["apiVersion"], budget["kind"]) == ("policy/v1", "PodDisruptionBudget")
    labels = cluster["workerGroupSpecs"][0]["template"]["metadata"]["labels"]
    assert budget["spec"]["selector"]["matchLabels"] == labels
    assert cluster["gcsFaultToleranceOptions"]["redisPassword"].keys() == {"valueFrom"}


def test_image_is_unprivileged_and_pinned() -> None:
    text = (ROOT / "deploy/Dockerfile").read_text()
    assert re.search(r"^ARG BASE=python:3\.11-", text, re.MULTILINE)
    users = re.findall(r"^USER (\S+)", text, re.MULTILINE)
    assert users == ["ray"]
    assert "--uid 1000" in text
    assert "--requirement requirements.txt" in text
    ignored = (ROOT / "deploy/Dockerfile.dockerignore").read_text().splitlines()
    assert ignored[0] == "*"  # everything, but for what is named
    for source in re.findall(r"^COPY --chown=ray:ray (\S+)", text, re.MULTILINE):
        assert (ROOT / source).exists()
        assert f"!{source}" in ignored
