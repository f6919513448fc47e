"""The jobs as one program: ``captioner NAME ...`` is ``python -m ray_jobs.NAME ...``.

captioner train --features runs/flickr8k/features --output runs/flickr8k/model
"""

import ast
import importlib
from pathlib import Path

from captioner.runtime import command_line

JOBS = (
    "extract_features",
    "train",
    "tune",
    "evaluate",
    "caption",
    "serve",
    "verify",
    "demo",
    "benchmark",
)


def main() -> None:
    name = command_line.take_name("captioner", {name: _about(name) for name in JOBS})
    importlib.import_module(f"ray_jobs.{name}").main()


def _about(name: str) -> str:
    """The first line of a job's docstring; imported, it would take Ray and torch with it."""
    source = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]


if __name__ == "__main__":
    main()
