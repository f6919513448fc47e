"""``cluster.yaml`` and ``deploy/aws.yaml`` against Ray's own launcher and a simulated AWS."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from moto import mock_aws
from ray.autoscaler._private.aws.config import bootstrap_aws
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.tags import TAG_RAY_NODE_KIND, TAG_RAY_USER_NODE_TYPE

# The simulation knows no bucket policies in templates; cfn-lint, below, knows them.
pytestmark = pytest.mark.filterwarnings("ignore:Tried to parse AWS..S3..BucketPolicy:UserWarning")

ROOT = Path(__file__).resolve().parents[2]
ZEROS = re.compile(r"\b(?:ami|subnet|sg)-0{17}\b")


def load() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    return found


@pytest.fixture
def account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, str]]:
    """A simulated AWS account with the stack of ``deploy/aws.yaml``; its outputs."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "simulated")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # the launcher writes ~/.ssh
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text("0" * 64)
    monkeypatch.chdir(ROOT)
    with mock_aws():
        ec2 = boto3.client("ec2")
        vpc = ec2.create_vpc(CidrBlock="10.0.0.0/16")["Vpc"]["VpcId"]
        subnet = ec2.create_subnet(VpcId=vpc, CidrBlock="10.0.0.0/24")["Subnet"]["SubnetId"]
        image = ec2.describe_images()["Images"][0]["ImageId"]
        boto3.client("ssm").put_parameter(Name="/test/image", Value=image, Type="String")
        stacks = boto3.client("cloudformation")
        # The simulation has no public parameters, and looks defaults up even where a value is given.
        template = re.sub(
            r"\n    Default: /aws/service/\S+", "", (ROOT / "deploy/aws.yaml").read_text()
        )
        stacks.create_stack(
            StackName="captioner",
            TemplateBody=template,
            Capabilities=["CAPABILITY_NAMED_IAM"],
            Parameters=[
                {"ParameterKey": "Vpc", "ParameterValue": vpc},
                {"ParameterKey": "Subnet", "ParameterValue": subnet},
                {"ParameterKey": "Image", "ParameterValue": "/test/image"},
            ],
        )
        stack = stacks.describe_stacks(StackName="captioner")["Stacks"][0]
        assert stack["StackStatus"] == "CREATE_COMPLETE"
        outputs = {output["OutputKey"]: output["OutputValue"] for output in stack["Outputs"]}
        yield outputs | {"ImageId": image}


def filled(outputs: dict[str, str]) -> dict[str, Any]:
    """The file with its zeros replaced, as an operator replaces them."""
    text = (ROOT / "cluster.yaml").read_text()
    for prefix, name in (("ami", "ImageId"), ("subnet", "SubnetId"), ("sg", "SecurityGroupId")):
        text = text.replace(f"{prefix}-{'0' * 17}", outputs[name])
    assert not ZEROS.search(text)
    found: dict[str, Any] = yaml.safe_load(text)
    return found


def test_file_keeps_rays_schema() -> None:
    validate_config(prepare_config(load()))  # with the launcher's defaults for what is left out
    wrong = prepare_config(load()) | {"max_worker": 3}
    with pytest.raises(Exception, match="max_worker"):
        validate_config(wrong)


def test_launcher_brings_up_private_encrypted_nodes_without_keys(account: dict[str, str]) -> None:
    config = bootstrap_aws(prepare_config(filled(account)))
    validate_config({name: value for name, value in config.items() if name != "head_node"})
    types = config["available_node_types"]
    assert types["head"]["resources"]["CPU"] == 0
    group = boto3.resource("ec2").SecurityGroup(account["SecurityGroupId"])
    assert group.ip_permissions  # from itself, and from nowhere else
    for permission in group.ip_permissions:
        assert permission["IpRanges"] == permission["Ipv6Ranges"] == []
        assert {pair["GroupId"] for pair in permission["UserIdGroupPairs"]} == {group.id}
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    # Of what is asked of EC2, the simulated one keeps a part; the request itself says all.
    asked = []
    create = provider.ec2_fail_fast.create_instances

    def record(**request: Any) -> Any:
        asked.append(request)
        return create(**request)

    provider.ec2_fail_fast = type("Recorder", (), {"create_instances": staticmethod(record)})()
    for name, node_type in types.items():
        kind = "head" if name == config["head_node_type"] else "worker"
        provider.create_node(
            node_type["node_config"],
            {TAG_RAY_NODE_KIND: kind, TAG_RAY_USER_NODE_TYPE: name},
            1,
        )
    assert len(asked) == len(types) == 4
    for request, name in zip(asked, types, strict=True):
        assert request["SecurityGroupIds"] == [account["SecurityGroupId"]]
        assert request["ImageId"] == account["ImageId"]
        assert "NetworkInterfaces" not in request  # no public address
        assert all(
            volume["Ebs"]["Encrypted"] and volume["Ebs"]["DeleteOnTermination"]
            for volume in request["BlockDeviceMappings"]
        )
        assert request["MetadataOptions"]["HttpTokens"] == "required"
        profile = "captioner-head" if name == "head" else "captioner-worker"
        assert request["IamInstanceProfile"] == {"Name": profile}
        boto3.client("iam").get_instance_profile(InstanceProfileName=profile)
        spot = request.get("InstanceMarketOptions", {}).get("MarketType")
        assert spot == ("spot" if name.endswith("_spot") else None)
    assert len(provider.non_terminated_nodes({})) == 4


def test_resources_are_those_of_the_instances(account: dict[str, str]) -> None:
    """More CPUs or GPUs than a node has would let the autoscaler wait for ever."""
    config = filled(account)
    claimed = {name: node["resources"] for name, node in config["available_node_types"].items()}
    for node in config["available_node_types"].values():
        node["resources"] = {}
    found = AWSNodeProvider.fillout_available_node_types_resources(config)["available_node_types"]
    for name, resources in claimed.items():
        measured = found[name]["resources"]
        assert measured.get("GPU", 0) == resources.get("GPU", 0), name
        assert name == "head" or measured["CPU"] == resources["CPU"], name


def test_one_gpu_stays_whatever_spot_does() -> None:
    config = load()
    types = config["available_node_types"]
    assert types["gpu_on_demand"]["min_workers"] == 1
    assert "InstanceMarketOptions" not in types["gpu_on_demand"]["node_config"]
    assert all(types[name]["min_workers"] == 0 for name in ("gpu_spot", "cpu_spot"))
    assert config["max_workers"] == sum(node["max_workers"] for node in types.values())
    assert config["idle_timeout_minutes"] <= 30


def test_every_node_needs_the_token_and_the_dashboard_is_loopbacks() -> None:
    config = load()
    starts = [
        command
        for part in ("head_start_ray_commands", "worker_start_ray_commands")
        for command in config[part]
        if "ray start" in command
    ]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token ray start" in command for command in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert "--num-cpus=0" in starts[0]
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert config["provider"]["use_internal_ips"] is True
    everything = json.dumps(config)
    assert "0.0.0.0" not in everything
    assert not re.search(r"AKIA|aws_secret|aws_access|RAY_AUTH_TOKEN=", everything)
    region = config["provider"]["region"]
    assert set(re.findall(r"\b[a-z]{2}-[a-z]+-\d\b", everything)) == {region}


def test_commands_are_valid_shell() -> None:
    config = load()
    for part in ("setup_commands", "head_start_ray_commands", "worker_start_ray_commands"):
        for command in config[part]:
            subprocess.run(["bash", "-n", "-c", command], check=True)


def test_nodes_install_what_the_submitter_has() -> None:
    config = load()
    assert config["file_mounts"]["~/captioner/requirements.txt"] == "requirements.txt"
    install = [line for line in config["setup_commands"] if "--requirements" in line]
    assert len(install) == 1
    import ray

    pinned = (ROOT / "requirements.txt").read_text().splitlines()
    assert f"ray=={ray.__version__}" in pinned
    assert any("--python 3.11" in line for line in config["setup_commands"])


def test_stack_passes_its_own_linter() -> None:
    done = subprocess.run(
        [str(Path(sys.executable).with_name("cfn-lint")), str(ROOT / "deploy/aws.yaml")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
