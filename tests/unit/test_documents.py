"""Every command of the documents is one that its own program takes. Those of jobs are run, too: tests/jobs."""

import itertools
import re
import shlex
import subprocess
from collections.abc import Callable

import botocore.session
import click
import pytest
from ray.scripts.scripts import cli as ray_cli
from ray.serve.scripts import cli as serve_cli

from benchmarks import config as benchmarks
from captioner.errors import ConfigError
from captioner.presets import PRESETS
from captioner.runtime import command_line
from ray_jobs.__main__ import JOBS
from tests.api import Client
from tests.documents import WRITTEN, job_of
from tests.head import ROOT
from tests.pictures import picture

CONFIGS = {
    **JOBS,
    "benchmark driver": benchmarks.BenchmarkDriverConfig,
    "benchmark extract": benchmarks.BenchmarkExtractConfig,
    "benchmark gpu": benchmarks.BenchmarkGpuConfig,
    "benchmark kept": benchmarks.BenchmarkKeptConfig,
    "benchmark runtime": benchmarks.BenchmarkRuntimeConfig,
    "benchmark scores": benchmarks.BenchmarkScoresConfig,
    "benchmark serve": benchmarks.BenchmarkServeConfig,
    "benchmark simulate": benchmarks.BenchmarkSimulateConfig,
    "benchmark train": benchmarks.BenchmarkTrainConfig,
}
TARGETS = {"extract": "extract_features"}
FILES = re.compile(r"(?:^|[ =])((?:deploy/)?[\w.-]+\.(?:yaml|txt)|deploy/\w+)(?=\s|$)")


def parse_job(name: str, arguments: list[str]) -> object:
    config_type = CONFIGS[name]
    if arguments == ["--help"]:
        with pytest.raises(SystemExit) as stop:
            command_line.parse(config_type, arguments)
        assert stop.value.code == 0
        return None
    presets = PRESETS if name == "train" else None
    return command_line.parse(config_type, arguments, presets=presets)  # type: ignore[arg-type]


def check_python(words: list[str]) -> None:
    if words[1:3] == ["-m", "pytest"]:
        assert (ROOT / words[3]).exists()
    elif words[2].startswith("benchmarks."):
        assert (ROOT / f"{words[2].replace('.', '/')}.py").is_file()
    else:
        parse_job(*job_of(words))


def check_make(words: list[str]) -> None:
    shown = subprocess.run(
        ["make", "-n", "-o", ".venv/requirements.installed", *words[1:]],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    if words[1].startswith("submit-"):
        target = words[1].removeprefix("submit-")
        arguments = next((word[5:] for word in words if word.startswith("ARGS=")), "")
        name = TARGETS.get(target, target)
        assert f"ray_jobs.{name}" in shown.stdout
        assert (ROOT / "ray_jobs" / f"{name}.py").is_file()
        parse_job(name, shlex.split(arguments))


def check_click(group: click.Command) -> Callable[[list[str]], None]:
    def check(words: list[str]) -> None:
        command, rest = group, words[1:]
        while isinstance(command, click.Group):
            found = command.get_command(click.Context(command), rest[0])
            assert found is not None, f"no command {rest[0]}"
            command, rest = found, rest[1:]
        command.make_context(command.name, list(rest))  # raises on an unknown flag
        assert_files(words)

    return check


def check_aws(words: list[str]) -> None:
    service, operation, *rest = words[1:]
    flags = {word.removeprefix("--") for word in rest if word.startswith("--")}
    if (service, operation) == ("cloudformation", "deploy"):  # the command line's own, not an API
        assert flags == {"stack-name", "template-file", "capabilities", "parameter-overrides"}
        template = (ROOT / rest[rest.index("--template-file") + 1]).read_text()
        given = rest[rest.index("--parameter-overrides") + 1 :]
        assert all(f"  {pair.partition('=')[0]}:\n" in template for pair in given)
        return
    model = botocore.session.get_session().get_service_model(service)
    name = "".join(part.title() for part in operation.split("-"))
    shape = model.operation_model(name).input_shape
    members = {re.sub(r"(?<!^)(?=[A-Z])", "-", member).lower() for member in shape.members}
    assert flags <= members | {"query", "region", "output"}


def check_kubectl(words: list[str]) -> None:
    assert words[1] in {"create", "apply", "port-forward"}
    assert_files(words)


def check_docker(words: list[str]) -> None:
    assert words[1] == "build"
    assert_files(words)


def check_curl(words: list[str]) -> None:
    """The request is one that the API answers."""
    files, body = {}, b""
    for flag, value in itertools.pairwise(words[1:-1]):
        if flag == "--data-binary":
            body = picture(0)
        elif flag == "-F":
            name, _, text = value.partition("=")
            files[name] = ("dog.jpg", picture(0)) if text.startswith("@") else (None, text)
    path = words[-1].removeprefix("http://127.0.0.1:8000")
    answer = Client().post(path, content=body or None, files=files or None)
    assert answer.status_code == 200, answer.text


def check_session(words: list[str]) -> None:
    """A program for files of a Ray session, which tests/jobs looks for on a head."""
    assert "/tmp/ray/session_latest/metrics/" in " ".join(words)


def assert_made(words: list[str]) -> None:
    """A file of the environment."""
    assert words[1:] == [".venv/bin/activate"]


def assert_files(words: list[str]) -> None:
    for name in FILES.findall(" ".join(words)):
        assert (ROOT / name).is_file(), name


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "captioner": lambda words: parse_job(*job_of(words)),
    "source": assert_made,
    "python": check_python,
    "make": check_make,
    "ray": check_click(ray_cli),
    "serve": check_click(serve_cli),
    "aws": check_aws,
    "kubectl": check_kubectl,
    "docker": check_docker,
    "curl": check_curl,
    "prometheus": check_session,
    "grafana-server": check_session,
}


def check(command: str) -> None:
    words = shlex.split(command)
    assert words[0] in CHECKS, f"no test knows the command {words[0]}"
    CHECKS[words[0]](words)


@pytest.mark.parametrize(("document", "command"), WRITTEN)
def test_command_of_a_document_is_a_valid_one(document: str, command: str) -> None:
    check(command)


@pytest.mark.parametrize(
    "command",
    [
        "python -m ray_jobs.train --featurs x --output y",
        "python -m ray_jobs.nothing --output y",
        "captioner nothing --output y",
        "captioner train --featurs x --output y",
        "make submit-nothing",
        "make submit-train ARGS='--epochs many'",
        "ray up absent.yaml",
        "ray job submit --no-such-flag -- true",
        "aws cloudformation describe-stacks --no-such-flag x",
        "kubectl apply --filename deploy/absent.yaml",
        "curl http://127.0.0.1:8000/v9/captions",
        "curl -F image=@dog.jpg -F beam_size=many http://127.0.0.1:8000/v1/captions",
        "curl -F beam_size=3 http://127.0.0.1:8000/v1/captions",
        "prometheus --config.file=prometheus.yml",
        "some-other-program --flag",
    ],
)
def test_wrong_command_is_found(command: str) -> None:
    with pytest.raises((AssertionError, ConfigError, click.ClickException, KeyError)):
        check(command)


def test_documents_have_commands() -> None:
    assert {"README.md", "OPERATIONS.md"} <= {document for document, _ in WRITTEN}
    assert len(WRITTEN) > 25
    programs = {command.split()[0] for _, command in WRITTEN}
    assert {"python", "make", "ray", "aws", "kubectl", "docker"} <= programs
