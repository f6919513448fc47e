"""Memory of the driver by step, in bytes an image, with a real folder of empty files and real tables of their rows."""

import gc
import logging
import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.config import BenchmarkDriverConfig
from benchmarks.measurement import Measurement, Row
from captioner.artifacts.feature_store import FeatureStore
from captioner.artifacts.manifests import (
    Counts,
    EncoderRecord,
    FileEntry,
    SplitCounts,
    StoreManifest,
)
from captioner.artifacts.output import Output
from captioner.artifacts.tables import feature_rows
from captioner.config import EncoderConfig
from captioner.encoders.family import family_of
from captioner.encoders.spec import EncoderSpec
from captioner.features.extract import count_splits, write_captions
from captioner.features.row_marks import (
    CHECKPOINT,
    count_rows,
    finish_rows,
    finished,
)
from captioner.sources import open_source
from captioner.sources.base import Source
from captioner.sources.beginning import keep_beginning

logger = logging.getLogger(__name__)

_FOLDERS = 1000  # files in each
_ROWS_PER_FILE = 5000


class DriverBenchmark(Measurement):
    """Bytes an image beyond what the process held before the first step, at the peak of each: what is held on, and what
    the step itself takes."""

    images: int
    path_length: int
    captions: int
    """For each image, in a CSV file beside them; 0: no file."""
    listing: float
    """Opening the source."""
    held: float
    """What of that stays."""
    continuing: float
    """Opening it in a run that goes on: the kept listing, today's, and what has changed."""
    planning: float
    """Reading the marks of half the images and planning the tasks for the others. Without a Ray, in whose object store
    what is known of these would lie once more."""
    publishing: float
    """Writing captions, checking that every image has one row, counting splits."""
    reading: float
    """Locating a split's images in the published store, as training does."""

    def table(self) -> str:
        steps = ("listing", "held", "continuing", "planning", "publishing", "reading")
        head = f"{self.images:,} images, paths of {self.path_length} characters, {self.captions} captions each"
        return "\n".join([head, *(f"{name:12}{getattr(self, name):8.0f} bytes" for name in steps)])

    def rows(self) -> Sequence[Row]:
        return [self.model_dump()]


def benchmark_driver(config: BenchmarkDriverConfig) -> DriverBenchmark:
    """Take one run's steps in the driver, one after the other."""
    with tempfile.TemporaryDirectory(dir=config.scratch) as folder:
        photos, root = Path(folder, "photos"), str(Path(folder, "out"))
        logger.info("%s empty files", f"{config.images:,}")
        _write_photos(photos, config)
        # What every process needs that imports all of this and has done each step once.
        small = Path(folder, "small")
        _write_photos(small, config.model_copy(update={"images": 100}))
        _steps(small, str(Path(folder, "small_out")))
        found = _steps(photos, root)
    return DriverBenchmark(
        images=config.images,
        path_length=config.path_length,
        captions=config.captions,
        **{name: value / config.images for name, value in found.items()},
    )


def _steps(photos: Path, root: str) -> dict[str, float]:
    found: dict[str, float] = {}
    before = _settled()

    @contextmanager
    def measured(name: str) -> Iterator[None]:
        logger.info("%s", name)
        _settled()
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        yield
        found[name] = max(0, _status("VmHWM") - before)

    with measured("listing"):
        source = open_source(str(photos), output=root)
    found["held"] = max(0, _settled() - before)
    with Output(root, {"job": "benchmark"}) as output:
        keep_beginning(output, source)
        _write_rows(source, output, "features")
        del source
        with measured("continuing"):
            source = open_source(str(photos), output=root)
        with measured("planning"):
            tasks = source.images(finished(output)).get_read_tasks(1)
        del tasks
        with measured("publishing"):
            files = write_captions(source, output)
            rows = finish_rows(output, "features", source.num_images())
            count_rows(rows, source.left_out())
            splits = count_splits(rows, output, files)
        output.publish(_manifest(source, [*rows.files, *files], splits))
    del source
    split = max(splits, key=lambda name: splits[name].images)
    with measured("reading"):
        store = FeatureStore.open(root)
        store.chunks(split, 10_000)
    return found


def _settled() -> int:
    """Bytes that this process holds for good."""
    gc.collect()
    pa.default_memory_pool().release_unused()
    return _status("VmRSS")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024


def _write_photos(folder: Path, config: BenchmarkDriverConfig) -> None:
    width = config.path_length - len("0000/.jpg")
    rows = []
    for number in range(config.images):
        name = f"{number // _FOLDERS:04d}/{number:0{width}d}.jpg"
        if number % _FOLDERS == 0:
            (folder / name).parent.mkdir(parents=True)
        (folder / name).touch()
        rows += [
            f"{name},A small brown dog runs over the wide green field {n}.\n"
            for n in range(config.captions)
        ]
        if config.captions and (number % _FOLDERS == 0 or number + 1 == config.images):
            with (folder / "captions.csv").open("a") as file:
                file.writelines(["image,caption\n"] * (number == 0) + rows)
            rows = []


def _write_rows(source: Source, output: Output, directory: str) -> None:
    """A row for each image, marks for the files of one half."""
    every = (name for name, _ in source.files())
    schema = feature_rows(_spec().shape, grid=False, thumbnails=False)
    files = math.ceil(source.num_images() / _ROWS_PER_FILE)
    for folder in (output.uri(directory), output.work(CHECKPOINT)):
        Path(folder).mkdir(parents=True)
    for number in range(files):
        ids = list(map(str, islice(every, _ROWS_PER_FILE)))
        columns = {field.name: pa.nulls(len(ids), field.type) for field in schema}
        columns |= {"image_id": pa.array(ids), "uri": pa.array(ids)}
        pq.write_table(pa.table(columns, schema), f"{output.uri(directory)}/{number:06d}.parquet")
        if number % 2 == 0:
            mark = f"{output.work(CHECKPOINT)}/{number:06d}.parquet"
            pq.write_table(pa.table({"image_id": ids}), mark)


def _spec() -> EncoderSpec:
    encoder = EncoderConfig(weights="random", layer="layer3")
    family, _ = family_of(encoder.name)
    return family.spec(encoder, family.weights(encoder)[0], "float32")


def _manifest(
    source: Source, files: list[FileEntry], splits: dict[str, SplitCounts]
) -> StoreManifest:
    return StoreManifest(
        encoder=EncoderRecord(spec=_spec(), weights="random"),
        source=source.identity(),
        grid=False,
        counts=Counts(ok=source.num_images(), rejected=0, unreadable=0),
        splits=splits,
        files=files,
    )
