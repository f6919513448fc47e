"""The commands that people read: those of the documents' fenced blocks."""

import re
import shlex
from collections.abc import Iterator

from tests.head import ROOT

DOCUMENTS = ("README.md", "GUIDE.md", "ARCHITECTURE.md", "OPERATIONS.md", "benchmarks/README.md")


BLOCK = re.compile(r"^```(?:bash|sh)?\n(.*?)^```", re.MULTILINE | re.DOTALL)


def block_with(document: str, words: str) -> str:
    """The one fenced block of a document that holds ``words``."""
    text = (ROOT / document).read_text(encoding="utf-8")
    (found,) = (block for block in BLOCK.findall(text) if words in block)
    return str(found)


def commands(text: str) -> Iterator[str]:
    """Commands of the fenced blocks, comments left out and continued lines joined. A block of a drawing has none."""
    for block in BLOCK.findall(text):
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
