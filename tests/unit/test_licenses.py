"""Every direct dependency's licence is named."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_direct_dependency_and_no_other_is_listed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"].get("optional-dependencies", {}).values()
    wanted = [
        *project["project"]["dependencies"],
        *project["dependency-groups"]["dev"],
        *(entry for extra in extras for entry in extra),
    ]
    names = {re.split(r"[\[<>=~ ]", entry)[0] for entry in wanted}
    software = (ROOT / "LICENSES.md").read_text().partition("## Data sets")[0]
    listed = re.findall(r"^\| ([a-z][\w-]*)(?: \(.*?\))? \|", software, re.MULTILINE)
    assert sorted(name for name in listed if name != "package") == sorted(names)
