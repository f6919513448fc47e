"""The same pictures through extract_features and its peers: images a second, memory, start-up, and what faults do.

python -m benchmarks.peers.side_by_side PHOTOGRAPHS [RESULTS.csv]

PHOTOGRAPHS is a folder of JPEG files. Each program runs twice, on 300 and on 900 pictures: the difference gives images
a second, the rest is its start-up. Then once with a file that is no picture, and once killed half-way and run again.
"""

import importlib.util
import itertools
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.measurement import Row, append_rows

FEW, MANY = 300, 900
PROGRAMS = {
    "captioner": [
        "-m", "ray_jobs.extract_features", "--source", "{folder}", "--output", "{output}",
        "--encoder.weights", "random", "--encoder.compute", "float32",
    ],
    "DataLoader": ["-m", "benchmarks.peers.dataloader", "{folder}", "{output}"],
    "Daft": ["-m", "benchmarks.peers.daft_frame", "{folder}", "{output}"],
}  # fmt: skip


@dataclass(frozen=True)
class Ran:
    """One run of a program."""

    status: int
    seconds: float
    peak_bytes: int
    """Of the program and its children together, shared memory counted once a process."""
    rows: int
    """In what it left, that can be read."""


def run(name: str, folder: Path, output: Path, kill_after: float | None = None) -> Ran:
    """Run a program to its end, or kill it and all its children."""
    words = [word.format(folder=folder, output=output) for word in PROGRAMS[name]]
    begun = time.monotonic()
    with open(f"{output}.log", "ab") as log:
        process = subprocess.Popen(
            [sys.executable, *words], stdout=log, stderr=log, start_new_session=True
        )
        peak = 0
        while process.poll() is None:
            peak = max(peak, _memory(process.pid))
            if kill_after is not None and time.monotonic() - begun > kill_after:
                for one in [*_family(process.pid), psutil.Process(process.pid)]:
                    one.send_signal(signal.SIGKILL)
                process.wait()
            time.sleep(0.2)
    return Ran(process.returncode, time.monotonic() - begun, peak, _rows(output))


def _family(pid: int) -> list[psutil.Process]:
    try:
        found: list[psutil.Process] = psutil.Process(pid).children(recursive=True)
        return found
    except psutil.NoSuchProcess:
        return []


def _memory(pid: int) -> int:
    found = 0
    for one in _family(pid):
        try:
            found += one.memory_info().rss - one.memory_info().shared
        except psutil.NoSuchProcess:
            continue
    try:
        own = psutil.Process(pid).memory_info()
        return int(found + own.rss - own.shared)
    except psutil.NoSuchProcess:
        return found


def _rows(output: Path) -> int:
    rows = 0
    files = [*output.rglob("*.parquet"), *output.parent.glob(f"{output.name}.parquet")]
    for file in files:
        if "_work" in file.parts or "captions" in file.parts:
            continue
        try:
            rows += pq.ParquetFile(file).metadata.num_rows
        except (pa.ArrowInvalid, OSError) as error:
            print(f"{file.name}: {error}", file=sys.stderr)
    return rows


def main() -> None:
    photographs = sorted(Path(sys.argv[1]).rglob("*.jpg"))
    results = sys.argv[2] if len(sys.argv) > 2 else None
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        for count in (FEW, MANY):
            (root / f"{count}").mkdir()
            turns = itertools.islice(itertools.cycle(photographs), count)
            for number, photograph in enumerate(turns):
                shutil.copy(photograph, root / f"{count}/{number}.jpg")
        shutil.copytree(root / f"{FEW}", root / "bad")
        (root / "bad/bad.jpg").write_bytes(b"\xff\xd8 no picture")
        for name in PROGRAMS:
            if name == "Daft" and importlib.util.find_spec("daft") is None:
                print("Daft is not installed: left out")
                continue
            few, many = (run(name, root / f"{n}", root / f"{name}-{n}") for n in (FEW, MANY))
            rate = (MANY - FEW) / (many.seconds - few.seconds)
            bad = run(name, root / "bad", root / f"{name}-bad")
            half = few.seconds - FEW / rate + 0.5 * MANY / rate
            killed = run(name, root / f"{MANY}", root / f"{name}-killed", kill_after=half)
            again = run(name, root / f"{MANY}", root / f"{name}-killed")
            rows.append(
                {
                    "program": name,
                    "images_per_second": rate,
                    "startup_seconds": few.seconds - FEW / rate,
                    "peak_bytes": many.peak_bytes,
                    "status_with_a_bad_picture": bad.status,
                    "rows_with_a_bad_picture": bad.rows,
                    "rows_after_a_kill": killed.rows,
                    "status_when_run_again": again.status,
                    "rows_when_run_again": again.rows,
                    "seconds_when_run_again": again.seconds,
                }
            )
            print(rows[-1], asdict(few), asdict(many), sep="\n", flush=True)
    if results:
        append_rows(results, rows, " ".join(["python", "-m", "benchmarks.peers.side_by_side"]))


if __name__ == "__main__":
    main()
