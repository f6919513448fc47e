"""``make submit-*``: a cluster of three nodes, the package that travels to it, and how a job's end is told."""

import json
import os
import signal
import subprocess
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.head import RAY, ROOT, Head, free_port

pytestmark = pytest.mark.timeout(900)

JOBS = {
    "extract": "extract_features",
    "train": "train",
    "tune": "tune",
    "evaluate": "evaluate",
    "caption": "caption",
    "serve": "serve",
}


@contextmanager
def ray_node(head: Head, log: Path) -> Iterator[None]:
    """One more node of two CPUs, as another machine would start it."""
    command = [
        str(RAY), "start", "--block", f"--address={head.address}", "--num-cpus=2",
        "--object-store-memory=200000000", f"--dashboard-agent-listen-port={free_port()}",
    ]  # fmt: skip
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=head.environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def cluster(head: Head, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """The head and two more nodes."""
    folder = tmp_path_factory.mktemp("nodes")
    wait = (
        "import ray, sys, time\n"
        "ray.init(logging_level='ERROR')\n"
        "deadline = time.monotonic() + 120\n"
        "while sum(node['Alive'] for node in ray.nodes()) < int(sys.argv[1]):\n"
        "    assert time.monotonic() < deadline, ray.nodes()\n"
        "    time.sleep(1)\n"
    )
    with ExitStack() as nodes:
        # One after the other: two raylets of one machine that start at once choose the same socket's name.
        for name, count in (("a", "2"), ("b", "3")):
            nodes.enter_context(ray_node(head, folder / f"{name}.log"))
            subprocess.run(
                [str(RAY.with_name("python")), "-c", wait, count],
                env=head.environment | {"RAY_ADDRESS": head.address},
                check=True,
            )
        yield head


def make(
    target: str, arguments: str, environment: dict[str, str], *options: str
) -> "subprocess.CompletedProcess[str]":
    """``make TARGET ARGS=...`` from the repository root, with an environment that is taken as installed."""
    return subprocess.run(
        ["make", *options, "-o", ".venv/requirements.installed", target, f"ARGS={arguments}"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(("target", "module"), JOBS.items())
def test_every_target_shows_the_plain_command(target: str, module: str) -> None:
    # Nor what the make that runs these tests hands on to the ones it starts.
    inherited = {"ADDRESS", "ARGS", "MAKELEVEL", "MAKEFLAGS", "MFLAGS"}
    environment = {k: v for k, v in os.environ.items() if k not in inherited}
    shown = make(f"submit-{target}", "--flag 'a b'", environment, "-n")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.strip() == (
        "RAY_AUTH_MODE=token .venv/bin/ray job submit --address http://127.0.0.1:8265 "
        f"--working-dir . -- python -m ray_jobs.{module} --flag 'a b'"
    )
    assert (ROOT / "ray_jobs" / f"{module}.py").is_file()


@pytest.mark.long
def test_submitted_extraction_uses_every_node_and_is_followed(
    cluster: Head, tmp_path: Path
) -> None:
    output = tmp_path / "a store"  # arguments keep their spaces
    done = make(
        "submit-extract",
        "--source shapes --source-options.shapes.train 40 --source-options.shapes.validation 4 "
        "--source-options.shapes.test 4 --encoder.weights random --encoder.layer layer3 "
        f"--output '{output}'",
        cluster.environment | {"ADDRESS": cluster.dashboard},
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert json.loads((output / "manifest.json").read_text())["total"]["images"] == 48
    shown = done.stdout + done.stderr
    assert "Ray: 8 CPUs, 0 GPUs" in shown  # four of the head's, two of each node's
    assert "48 images" in shown
    assert cluster.environment["RAY_AUTH_TOKEN"] not in shown


def test_failing_job_ends_the_command_with_its_failure(cluster: Head, tmp_path: Path) -> None:
    done = make(
        "submit-train",
        f"--features {tmp_path}/absent --output {tmp_path}/model",
        cluster.environment | {"ADDRESS": cluster.dashboard},
    )
    assert done.returncode != 0
    assert "not a feature store" in done.stdout + done.stderr
    assert not (tmp_path / "model" / "manifest.json").exists()


def test_without_the_token_nothing_is_submitted(cluster: Head, tmp_path: Path) -> None:
    stranger = {k: v for k, v in cluster.environment.items() if k != "RAY_AUTH_TOKEN"}
    for token in ({}, {"RAY_AUTH_TOKEN": "0" * 64}):
        done = make(
            "submit-extract",
            f"--source shapes --output {tmp_path}/features",
            stranger | {"HOME": str(tmp_path), "ADDRESS": cluster.dashboard} | token,
        )
        assert done.returncode != 0
        assert "oken" in done.stdout + done.stderr
        assert not (tmp_path / "features").exists()


def test_package_holds_the_code_and_nothing_else(tmp_path: Path) -> None:
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import create_package

    checkout = tmp_path / "checkout"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    files = [name for name in listed.stdout.split("\0") if (ROOT / name).is_file()]
    stray = [
        ".git/objects/ab/cd", ".venv/lib/x.py", "runs/demo/model/weights.safetensors", "data/1.jpg",
        "captioner/__pycache__/x.pyc", "photo.jpg", "table.parquet", "resnet.pth", "key.pem", ".env",
        ".mypy_cache/x.json", "model.safetensors",
    ]  # fmt: skip
    for name in files + stray:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_bytes((ROOT / name).read_bytes() if name in files else b"x" * 9999)
    package = tmp_path / "package.zip"
    create_package(
        str(checkout),
        package,
        include_gitignore=True,
        excludes=get_runtime_env_default_excludes(),
    )
    with zipfile.ZipFile(package) as archive:
        held = {name for name in archive.namelist() if not name.endswith("/")}
    assert held.isdisjoint(stray)
    code = {
        name
        for name in files
        if name.startswith(("captioner/", "ray_jobs/", "benchmarks/"))
        and not name.startswith("benchmarks/results/")
    }
    assert code <= held
    rest = {".gitignore", ".rayignore", "ARCHITECTURE.md", "LICENSE", "Makefile", "OPERATIONS.md",
            "README.md", "cluster.yaml", "pyproject.toml", "requirements.txt"}  # fmt: skip
    assert held - code <= rest
    assert package.stat().st_size < 2**20
