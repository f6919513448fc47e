"""Nothing that a user supplies can run code: no pickle, no unchecked torch.load, no eval, no shell."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Formats that run code when they are read. An exception class does not read anything.
UNSAFE_MODULES = {
    "pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "jsonpickle"
}  # fmt: skip
HARMLESS = {"UnpicklingError"}
UNSAFE_CALLS = {"eval", "exec", "compile", "os.system", "os.popen"} | {
    f"{module}.{name}"
    for module, names in {
        "pd": ["read_pickle"],
        "pandas": ["read_pickle"],
        "yaml": ["load", "load_all", "unsafe_load", "full_load"],
        "torch": ["jit.load", "hub.load", "package.PackageImporter"],
    }.items()
    for name in names
}
# Calls that are safe only with this argument, and arguments that are never safe.
NEEDED = {"torch.load": ("weights_only", True)}
FORBIDDEN = {
    ("allow_pickle", True),
    ("shell", True),
    ("verify", False),
    ("trust_remote_code", True),
}


def dangers(source: str) -> list[str]:
    """Every way by which a file could run code of another, one line each."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in UNSAFE_MODULES:
                    found.append(f"{node.lineno}: imports {alias.name}")
        elif isinstance(node, ast.ImportFrom):
            names = {alias.name for alias in node.names} - HARMLESS
            if (node.module or "").split(".")[0] in UNSAFE_MODULES and names:
                found.append(f"{node.lineno}: imports {', '.join(sorted(names))}")
            elif node.module == "torch" and names & {"load", "hub", "jit"}:
                found.append(f"{node.lineno}: hides a loader of torch")
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            given = {
                keyword.arg: keyword.value.value
                for keyword in node.keywords
                if isinstance(keyword.value, ast.Constant)
            }
            if name in UNSAFE_CALLS:
                found.append(f"{node.lineno}: calls {name}")
            if name in NEEDED:
                argument, value = NEEDED[name]
                if given.get(argument) is not value:
                    found.append(f"{node.lineno}: {name} without {argument}={value}")
            found += [
                f"{node.lineno}: {argument}={value}"
                for argument, value in FORBIDDEN
                if argument in given and given[argument] is value
            ]
    return found


def test_no_file_of_the_project_loads_code() -> None:
    files = [*(ROOT / "captioner").rglob("*.py"), *(ROOT / "ray_jobs").rglob("*.py")]
    assert len(files) > 40
    found = {str(file): dangers(file.read_text(encoding="utf-8")) for file in files}
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("def f():\n    import pickle", "2: imports pickle"),
        ("from pickle import UnpicklingError, loads", "imports loads"),
        ("import torch\ntorch.load(file)", "torch.load without weights_only=True"),
        ("torch.load(file, weights_only=False)", "torch.load without weights_only=True"),
        ("torch.load(file, weights_only=flag)", "torch.load without weights_only=True"),
        ("from torch import load", "hides a loader of torch"),
        ("np.load(file, allow_pickle=True)", "allow_pickle=True"),
        ("pd.read_pickle(file)", "calls pd.read_pickle"),
        ("yaml.load(text, Loader)", "calls yaml.load"),
        ("subprocess.run(line, shell=True)", "shell=True"),
        ("datasets.load_dataset(name, trust_remote_code=True)", "trust_remote_code=True"),
        ("eval(text)", "calls eval"),
    ],
)
def test_each_danger_is_found(source: str, complaint: str) -> None:
    found = dangers(source)
    assert len(found) == 1
    assert complaint in found[0]


def test_safe_forms_pass() -> None:
    assert dangers("torch.load(file, weights_only=True)\nfrom pickle import UnpicklingError") == []
