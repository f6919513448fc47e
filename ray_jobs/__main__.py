"""The jobs as one program: ``captioner NAME ...`` is ``python -m ray_jobs.NAME ...``.

captioner train --features runs/flickr8k/features --output runs/flickr8k/model
eval "$(captioner completion bash)"
"""

import ast
import importlib
from pathlib import Path

from captioner import config
from captioner.runtime import command_line

# What each is told by flags; a benchmark has a configuration for each of its stages.
JOBS: dict[str, type[config.JobConfig]] = {
    "extract_features": config.ExtractConfig,
    "train": config.TrainConfig,
    "finetune": config.FinetuneConfig,
    "tune": config.TuneConfig,
    "evaluate": config.EvaluateConfig,
    "caption": config.CaptionConfig,
    "serve": config.ServeConfig,
    "search": config.SearchConfig,
    "compact": config.CompactConfig,
    "verify": config.VerifyConfig,
    "push": config.PushConfig,
    "demo": config.DemoConfig,
}
BENCHMARK, COMPLETION = "benchmark", "completion"


def main() -> None:
    about = {name: _about(name) for name in (*JOBS, BENCHMARK)}
    about[COMPLETION] = "Print what makes a shell (bash, zsh, fish) complete names and flags."
    name = command_line.take_name("captioner", about)
    if name == COMPLETION:
        command_line.print_completion("captioner", JOBS)
    else:
        importlib.import_module(f"ray_jobs.{name}").main()


def _about(name: str) -> str:
    """The first line of a job's docstring; imported, it would take Ray and torch with it."""
    source = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]


if __name__ == "__main__":
    main()
