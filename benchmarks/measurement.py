"""What a benchmark hands back, and the CSV files that its figures are appended to, with when, where and how."""

import csv
import io
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

from captioner import storage
from captioner.artifacts.manifests import Record
from captioner.runtime.device import num_cores

Row = Mapping[str, str | int | float | bool | None]

_ROOT = Path(__file__).parent.parent
# Names in /proc/cpuinfo of what decides how fast a network runs, the fastest first.
_FLAGS = {"amx_tile": "amx", "avx512_bf16": "avx512_bf16", "avx512f": "avx512", "avx2": "avx2"}


class Measurement(Record):
    """Figures of one run of a benchmark."""

    def table(self) -> str:
        """For a terminal."""
        raise NotImplementedError

    def rows(self) -> Sequence[Row]:
        """For CSV: one row for each thing measured, settings first."""
        raise NotImplementedError


def append_rows(uri: str, rows: Iterable[Row], command: str) -> None:
    """Append rows, each with the circumstances, to a CSV file, which is made if it is not there.

    A column that the file lacks is added to it, empty in earlier rows.

    Args:
        command: what gave the rows.

    Raises:
        StoreError: the file cannot be read or written.
    """
    around = circumstances() | {"command": command}
    there = storage.read_bytes(uri).decode() if storage.exists(uri) else ""
    table: list[Row] = list(csv.DictReader(io.StringIO(there, newline="")))
    table += [around | {name: _cell(value) for name, value in row.items()} for row in rows]
    text = io.StringIO(newline="")
    columns = list(dict.fromkeys(name for row in table for name in row))
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    storage.write_bytes(uri, text.getvalue().encode())


def circumstances() -> dict[str, str]:
    """When and where: date (UTC), commit, machine, versions. The machine is that of this process."""
    processor, flags = _processor()
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": _commit(),
        "processor": processor,
        "cores": str(num_cores()),
        "flags": " ".join(name for flag, name in _FLAGS.items() if flag in flags),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__,
        "ray": version("ray"),
    }


def _cell(value: str | int | float | bool | None) -> str:
    if value is None:
        return ""
    return f"{value:.7g}" if isinstance(value, float) else str(value)


def _processor() -> tuple[str, set[str]]:
    """Model name and flags, as Linux gives them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor(), set()
    # Every core repeats them.
    found = dict(
        (name.strip(), value.strip()) for name, _, value in (line.partition(":") for line in lines)
    )
    return found.get("model name", platform.machine()), set(found.get("flags", "").split())


def _commit() -> str:
    """Short hash, with + where the working tree has changes beyond the results; empty outside a checkout."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=_ROOT, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        changed = git("status", "--porcelain", "--", ".", ":!benchmarks/results")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except FileNotFoundError:  # no git
        return ""
