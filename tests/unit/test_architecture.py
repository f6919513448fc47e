"""The rules of the layout: imports point one way, Ray stays where it belongs, nothing large or private is committed."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# As ARCHITECTURE.md draws them: a room imports from those above it alone.
ROOMS = (
    "errors",
    "config",
    "storage",
    "notebook",
    "text",
    "presets",
    "images",
    "encoders",
    "decoders",
    "decoding",
    "plots",
    "artifacts",
    "runtime",
    "sources",
    "features",
    "captioning",
    "training",
    "tuning",
    "evaluation",
    "serving",
)
WITH_RAY = (
    "captioner.runtime.cluster",
    "captioner.runtime.data_context",
    "captioner.runtime.lifeline",
    "captioner.runtime.failures",
    "captioner.runtime.progress",
    "captioner.runtime.ray_private",
    "captioner.sources",
    "captioner.features",
    "captioner.training.worker",
    "captioner.training.checkpoints",
    "captioner.training.fit",
    "captioner.training.run",
    "captioner.training.finetune",
    "captioner.training.pictures",
    "captioner.captioning.collection",
    "captioner.tuning",
    "captioner.evaluation.pipeline",
    "captioner.serving",
    "ray_jobs",
)
# Where private names of Ray may stand: in the module for them and its tests, where Ray's own launcher and packaging are
# what is tested, and here.
WITH_PRIVATE_RAY = (
    "captioner/runtime/ray_private.py",
    "tests/conftest.py",
    "tests/unit/test_architecture.py",
    "tests/unit/test_ray_private.py",
    "tests/cluster/test_ray_private.py",
    "tests/deploy/test_aws.py",
    "tests/unit/test_submit.py",
)
PRIVATE_RAY = re.compile(r"\bray(\.\w+)*\.(_[a-z]\w*|v2)\b|\bfrom ray\S* import _[a-z]\w*")
RANKS = {name: rank for rank, name in enumerate(ROOMS)}
MAX_ENTRY_LINES = 80
MAX_FILE_BYTES = 2**20


def module_name(root: Path, path: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def python_files(root: Path, *folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from sorted((root / folder).rglob("*.py"))


def imports(path: Path, module: str) -> Iterator[tuple[str, int]]:
    """Modules that a file imports anywhere in it, inside functions too, with the line."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base]).rstrip(".")
            for alias in node.names:
                # "from captioner import text" names a module, "from captioner.text import X" does not.
                yield (f"{base}.{alias.name}" if base == "captioner" else base), node.lineno


def for_types(path: Path) -> set[int]:
    """Lines that only a type checker reads."""
    blocks = (
        node
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    return {line for block in blocks for line in range(block.lineno, 1 + (block.end_lineno or 0))}


def within(module: str, prefixes: tuple[str, ...]) -> bool:
    return any(module == prefix or module.startswith(f"{prefix}.") for prefix in prefixes)


def violations(root: Path) -> list[str]:
    """Every broken rule of the code under ``root``, one line each."""
    found = []
    for path in python_files(root, "captioner", "ray_jobs", "benchmarks", "tests"):
        private = PRIVATE_RAY.search(path.read_text())
        if private and str(path.relative_to(root)) not in WITH_PRIVATE_RAY:
            found.append(f"{path.relative_to(root)}: {private[0]} is private to Ray")
    for path in python_files(root, "captioner", "ray_jobs"):
        module = module_name(root, path)
        where = path.relative_to(root)
        unit = module.removeprefix("captioner").lstrip(".").split(".")[0]
        library = module.split(".")[0] == "captioner"
        if path.name == "utils.py":
            found.append(f"{where}: a module is named for what it does, not utils")
        if not path.name.startswith("_") and not ast.get_docstring(ast.parse(path.read_text())):
            found.append(f"{where}: no docstring")
        if not library and len(path.read_text().splitlines()) > MAX_ENTRY_LINES:
            found.append(f"{where}: more than {MAX_ENTRY_LINES} lines")
        if library and unit and unit not in RANKS:
            found.append(f"{where}: captioner.{unit} has no place in ROOMS")
            continue
        for imported, line in imports(path, module):
            if module == "captioner" and line in for_types(path):
                continue
            top, _, rest = imported.partition(".")
            target = rest.split(".")[0]
            if top == "ray" and not within(module, WITH_RAY):
                found.append(f"{where}:{line}: imports ray")
            elif top == "tests" or (top in ("ray_jobs", "benchmarks") and library):
                found.append(f"{where}:{line}: imports {top}")
            elif top == "captioner" and library and target in RANKS and target != unit:
                if unit and RANKS[target] > RANKS[unit]:
                    found.append(f"{where}:{line}: {unit} imports {target}, a later room")
                elif not unit:
                    found.append(f"{where}:{line}: importing captioner must import nothing else")
    return found


def test_code_keeps_the_layout() -> None:
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("path", "text", "complaint"),
    [
        (
            "captioner/text.py",
            '"""Text."""\nimport captioner.features.extract',
            "text imports features",
        ),
        ("captioner/text.py", '"""Text."""\nfrom captioner import features', "text imports feat"),
        ("captioner/text.py", '"""Text."""\nfrom .training import run', "text imports training"),
        ("captioner/text.py", '"""Text."""\nfrom . import training', "text imports training"),
        ("captioner/text.py", '"""Text."""\ndef f():\n    import ray', "text.py:3: imports ray"),
        ("captioner/training/steps.py", '"""S."""\nfrom ray import train', "imports ray"),
        ("captioner/text.py", '"""Text."""\nimport ray_jobs.demo', "imports ray_jobs"),
        ("captioner/__init__.py", '"""C."""\nfrom captioner import text', "must import nothing"),
        ("captioner/training/utils.py", '"""Helpers."""', "not utils"),
        ("captioner/novelty.py", '"""New."""', "captioner.novelty has no place"),
        ("captioner/text.py", "import re", "captioner/text.py: no docstring"),
        (
            "captioner/training/run.py",
            '"""R."""\nfrom ray._private import state',
            "run.py: ray._private is private to Ray",
        ),
        (
            "captioner/training/run.py",
            '"""R."""\nfrom ray.train.v2.api import exceptions',
            "run.py: ray.train.v2 is private to Ray",
        ),
        (
            "benchmarks/watch.py",
            '"""W."""\nimport ray.data._internal.stats',
            "watch.py: ray.data._internal is private to Ray",
        ),
        (
            "tests/test_it.py",
            '"""T."""\ndef f():\n    return ray._raylet',
            "test_it.py: ray._raylet is private to Ray",
        ),
        ("ray_jobs/train.py", '"""Train."""' + "\n" * MAX_ENTRY_LINES + "x = 1", "more than 80"),
    ],
)
def test_checker_finds_each_violation(tmp_path: Path, path: str, text: str, complaint: str) -> None:
    clean = {
        "captioner/__init__.py": '"""Captioner."""',
        "captioner/images.py": '"""Images."""\nfrom captioner.text import clean',
        "captioner/training/run.py": '"""Run."""\nimport ray\nfrom captioner import text',
        "ray_jobs/train.py": '"""Train."""\nimport ray\nfrom captioner.training import run',
    }
    for name, content in clean.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    assert violations(tmp_path) == []
    (tmp_path / path).parent.mkdir(exist_ok=True)
    (tmp_path / path).write_text(text)
    found = violations(tmp_path)
    assert len(found) == 1
    assert complaint in found[0]


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [
        (
            "captioner, captioner.config, captioner.errors",
            {"ray", "torch", "matplotlib", "pandas", "pyarrow"},
        ),
        # Of processes that load pictures, of which a node has one for each of its cores.
        ("captioner.features.pipeline, captioner.sources", {"torch", "torchvision", "matplotlib"}),
    ],
)
def test_what_every_process_loads_loads_fast(modules: str, heavy: set[str]) -> None:
    program = f"import sys, {modules}\nprint(sorted({heavy} & set(sys.modules)))"
    child = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert child.stdout.strip() == "[]"


def test_nothing_large_is_committed() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    files = [ROOT / name for name in listed.stdout.split("\0") if name]
    assert len(files) > 10
    # A file may be deleted and not yet committed.
    sizes = {str(file): file.stat().st_size for file in files if file.is_file()}
    assert {name: size for name, size in sizes.items() if size > MAX_FILE_BYTES} == {}


def test_requirements_are_pinned_and_name_no_index() -> None:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pinned = re.compile(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!]+( ; [^:/]+)?")
    assert [line for line in lines if not pinned.fullmatch(line)] == []
    assert len(lines) > 50
