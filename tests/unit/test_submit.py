"""``make submit-*``: the command it stands for, and the package that travels to the cluster."""

import os
import subprocess
import zipfile
from pathlib import Path

import pytest

from tests.head import ROOT

JOBS = {
    "extract": "extract_features",
    "train": "train",
    "tune": "tune",
    "evaluate": "evaluate",
    "caption": "caption",
    "serve": "serve",
}


@pytest.mark.parametrize(("target", "module"), JOBS.items())
def test_every_target_shows_the_plain_command(target: str, module: str) -> None:
    # Nor what the make that runs these tests hands on to the ones it starts.
    inherited = {"ADDRESS", "ARGS", "MAKELEVEL", "MAKEFLAGS", "MFLAGS"}
    environment = {k: v for k, v in os.environ.items() if k not in inherited}
    shown = subprocess.run(
        [
            "make",
            "-n",
            "-o",
            ".venv/requirements.installed",
            f"submit-{target}",
            "ARGS=--flag 'a b'",
        ],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.strip() == (
        "RAY_AUTH_MODE=token .venv/bin/ray job submit --address http://127.0.0.1:8265 "
        f"--working-dir . -- python -m ray_jobs.{module} --flag 'a b'"
    )
    assert (ROOT / "ray_jobs" / f"{module}.py").is_file()


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
    rest = {".gitignore", ".rayignore", "ARCHITECTURE.md", "GUIDE.md", "LICENSE", "LICENSES.md", "Makefile",
            "OPERATIONS.md", "README.md", "cluster.yaml", "pyproject.toml", "requirements.txt"}  # fmt: skip
    assert held - code <= rest
    assert package.stat().st_size < 2 * 2**20
