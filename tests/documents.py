"""The commands that people read: those of the documents' fenced blocks."""

import re
import shlex
from collections.abc import Iterator

from tests.head import ROOT

DOCUMENTS = ("README.md", "ARCHITECTURE.md", "OPERATIONS.md", "benchmarks/README.md")


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
    """Name and arguments of ``captioner NAME`` or ``python -m ray_jobs.NAME``; a benchmark's belongs to the name."""
    start = 1 if words[0] == "captioner" else 2
    name, arguments = words[start].removeprefix("ray_jobs."), words[start + 1 :]
    if name == "benchmark":
        name, arguments = f"{name} {arguments[0]}", arguments[1:]
    return name, arguments
