"""Every command of the documents works: run on tiny data where that can be, else parsed by its own program."""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import botocore.session
import click
import pytest
from ray.dashboard.modules.metrics import metrics_head
from ray.dashboard.modules.metrics import templates as metrics_templates
from ray.scripts.scripts import cli as ray_cli
from ray.serve.scripts import cli as serve_cli

from benchmarks import config as benchmarks
from captioner import config as settings
from captioner.errors import ConfigError
from captioner.presets import PRESETS
from captioner.runtime import command_line
from captioner.sources.scenes import draw_scene
from tests.head import ROOT, Head

pytestmark = pytest.mark.timeout(900)

DOCUMENTS = ("README.md", "ARCHITECTURE.md", "OPERATIONS.md", "benchmarks/README.md")
CONFIGS = {
    "extract_features": settings.ExtractConfig,
    "train": settings.TrainConfig,
    "tune": settings.TuneConfig,
    "evaluate": settings.EvaluateConfig,
    "caption": settings.CaptionConfig,
    "demo": settings.DemoConfig,
    "serve": settings.ServeConfig,
    "benchmark extract": benchmarks.BenchmarkExtractConfig,
    "benchmark scores": benchmarks.BenchmarkScoresConfig,
    "benchmark serve": benchmarks.BenchmarkServeConfig,
    "benchmark train": benchmarks.BenchmarkTrainConfig,
}
TARGETS = {"extract": "extract_features"}
# Real data and full size, made tiny; what is not named runs as it is written.
TINY = {
    "extract_features": [
        "--source", "shapes", "--source-options.shapes.train", "24", "--source-options.shapes.validation", "6",
        "--source-options.shapes.test", "6", "--encoder.weights", "random", "--encoder.layer", "layer3",
    ],
    "train": ["--decoder.width", "32", "--epochs", "1"],
}  # fmt: skip
FILES = re.compile(r"(?:^|[ =])((?:deploy/)?[\w.-]+\.(?:yaml|txt)|deploy/\w+)(?=\s|$)")


def commands(text: str) -> Iterator[str]:
    """Commands of the fenced blocks, comments left out and continued lines joined. A block of a drawing has none."""
    for block in re.findall(r"^```(?:bash|sh)?\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        if re.search(r"[─►│┬└]", block):
            continue
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield shlex.join(words)


WRITTEN = [
    (name, command)
    for name in DOCUMENTS
    for command in commands((ROOT / name).read_text(encoding="utf-8"))
]


def job_of(words: list[str]) -> tuple[str, list[str]]:
    """Name and arguments of ``python -m ray_jobs.NAME``; the benchmark's stage belongs to the name."""
    name, arguments = words[2].removeprefix("ray_jobs."), words[3:]
    if name == "benchmark":
        name, arguments = f"{name} {arguments[0]}", arguments[1:]
    return name, arguments


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
    path = re.sub(r"^http://127\.0\.0\.1:8000|\?.*", "", words[-1])
    source = "".join(file.read_text() for file in (ROOT / "captioner/serving").glob("*.py"))
    assert f'"{path}"' in source


def check_metrics(words: list[str]) -> None:
    """The file is one that Ray itself writes."""
    (path,) = re.findall(r"/tmp/ray/session_latest/(metrics/\S+)", " ".join(words))
    source = Path(metrics_head.__file__).read_text() + Path(metrics_templates.__file__).read_text()
    assert all(f'"{part}"' in source for part in Path(path).parts[1:])


def assert_files(words: list[str]) -> None:
    for name in FILES.findall(" ".join(words)):
        assert (ROOT / name).is_file(), name


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "python": check_python,
    "make": check_make,
    "ray": check_click(ray_cli),
    "serve": check_click(serve_cli),
    "aws": check_aws,
    "kubectl": check_kubectl,
    "docker": check_docker,
    "curl": check_curl,
    "prometheus": check_metrics,
    "grafana-server": check_metrics,
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
        "make submit-nothing",
        "make submit-train ARGS='--epochs many'",
        "ray up absent.yaml",
        "ray job submit --no-such-flag -- true",
        "aws cloudformation describe-stacks --no-such-flag x",
        "kubectl apply --filename deploy/absent.yaml",
        "curl http://127.0.0.1:8000/v9/captions",
        "prometheus --config.file=/tmp/ray/session_latest/metrics/prometheus/absent.yml",
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


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that looks like the repository's root to the jobs, with a folder of pictures."""
    root = tmp_path_factory.mktemp("sandbox")
    for package in ("captioner", "ray_jobs"):
        shutil.copytree(ROOT / package, root / package)
    (root / "my_photos").mkdir()
    for index in range(3):
        (root / "my_photos" / f"{index}.png").write_bytes(draw_scene(0, "test", index))
    return root


@pytest.mark.long
def test_jobs_of_the_documents_run_as_written_one_after_the_other(
    head: Head, sandbox: Path
) -> None:
    ran = []
    for document, command in WRITTEN:
        words = shlex.split(command)
        # Those of the benchmarks take hours.
        if document.startswith("benchmarks/") or words[0] != "python" or words[2] == "pytest":
            continue
        name, arguments = job_of(words)
        # They stay or take minutes, and have tests of their own.
        if name in ("serve", "tune", "benchmark extract", "benchmark train", "benchmark serve"):
            continue
        done = subprocess.run(
            [sys.executable, *words[1:], *TINY.get(name, [])],
            cwd=sandbox,
            env=head.environment | {"RAY_ADDRESS": head.address},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        ran.append(name)
    assert set(ran) >= {"extract_features", "train", "evaluate", "caption"}
    published = sorted(
        str(file.parent.relative_to(sandbox)) for file in sandbox.rglob("manifest.json")
    )
    assert published == [
        "runs/flickr8k/features", "runs/flickr8k/model", "runs/flickr8k/report", "runs/my_captions"
    ]  # fmt: skip
