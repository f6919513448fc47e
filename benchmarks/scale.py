"""Scaling on paper: what a data set would take and cost, from measured rates and a real store's sizes."""

from pydantic import BaseModel

from benchmarks.config import BenchmarkScaleConfig
from captioner import storage
from captioner.artifacts.feature_store import FeatureStore
from captioner.artifacts.schema import feature_rows, view_names
from captioner.features.pipeline import rows_per_file

DATA_SETS = {
    "Flickr30k": 31_783,
    "COCO 2014": 123_287,
    "CC12M": 12_000_000,
    "1 billion": 1_000_000_000,
}
# What the driver holds of an image when it checks or resumes a run: its id, URI, split and error in Arrow columns.
ROW_OVERHEAD = 24
# Copies that live for a moment: the driver's measured peak at ten million rows (`benchmark resume`) over those bytes.
PEAK_COPIES = 2.8


class DataSetScale(BaseModel):
    """One data set: sizes follow from the store; times and costs are for one node, and N nodes divide the time."""

    name: str
    images: int
    cpu_hours: float
    """On one CPU node."""
    cpu_cost: float
    gpu_hours: float
    """On one GPU node, at an assumed rate."""
    gpu_cost: float
    store_bytes: float
    store_cost: float
    """A month in object storage."""
    files: float
    manifest_bytes: float
    driver_bytes: float
    """Peak, while the driver checks ids, URIs and splits before it publishes."""
    bends: str
    """The first part of the design that no longer fits."""


class ScaleBenchmark(BaseModel):
    """A table of data sets, with the rates behind it."""

    cpu_rate: float
    gpu_rate: float
    """Images/s of one node."""
    gpu_bottleneck: str
    data_sets: list[DataSetScale]

    def table(self) -> str:
        """For a terminal."""
        lines = [
            f"CPU node {self.cpu_rate:,.0f} images/s (measured rate per CPU); "
            f"GPU node {self.gpu_rate:,.0f} images/s (ASSUMED; limit: {self.gpu_bottleneck})",
            f"{'data set':11}{'images':>15}{'CPU h':>10}{'CPU $':>9}{'GPU h':>9}{'GPU $':>8}"
            f"{'store GB':>10}{'$/month':>9}{'files':>12}{'manifest MB':>13}{'driver GB':>11}  bends first",
        ]
        for one in self.data_sets:
            lines.append(
                f"{one.name:11}{one.images:15,}{one.cpu_hours:10,.2f}{one.cpu_cost:9,.2f}"
                f"{one.gpu_hours:9,.2f}{one.gpu_cost:8,.2f}{one.store_bytes / 1e9:10,.0f}"
                f"{one.store_cost:9,.0f}{one.files:12,.0f}{one.manifest_bytes / 1e6:13,.1f}"
                f"{one.driver_bytes / 1e9:11,.2f}  {one.bends}"
            )
        return "\n".join(lines)


def benchmark_scale(config: BenchmarkScaleConfig) -> ScaleBenchmark:
    """Scale one store's sizes and the given rates to known data sets.

    Raises:
        StoreError: ``features`` is not a published feature store.
    """
    store = FeatureStore.open(config.features)
    files = [file for file in store.manifest.files if file.path.startswith("features/")]
    images = store.manifest.total.images
    listed = storage.list_files(storage.join(config.features, "features"))
    bytes_per_image = sum(info.size for info in listed) / images
    # Blocks of the pipeline make the files of a small store, ``rows_per_file`` those of a large one.
    manifest = store.manifest
    views = view_names(manifest.mirrored, manifest.crops)
    schema = feature_rows(manifest.encoder.channels, manifest.grid, views)
    rows_now = images / len(files)
    entry = sum(len(file.model_dump_json(indent=1)) for file in files) / len(files)
    uris = [uri for split in store.manifest.splits for uri in store.image_uris(split).items()]
    row = ROW_OVERHEAD + sum(len(name) + len(uri) for name, uri in uris) / max(1, len(uris))
    cpu_rate = config.images_per_second / config.cpus * config.node_cpus
    decoding = config.loaded_per_second / config.cpus * config.gpu_node_cpus
    gpu_rate = min(config.assumed_gpu_images_per_second, decoding)

    def scale(name: str, total: int) -> DataSetScale:
        cpu_hours, gpu_hours = (total / rate / 3600 for rate in (cpu_rate, gpu_rate))
        number = total / max(rows_now, rows_per_file(total, schema))
        listed_bytes, driver = number * entry, total * row * PEAK_COPIES
        return DataSetScale(
            name=name,
            images=total,
            cpu_hours=cpu_hours,
            cpu_cost=cpu_hours * config.assumed_node_price,
            gpu_hours=gpu_hours,
            gpu_cost=gpu_hours * config.assumed_gpu_node_price,
            store_bytes=total * bytes_per_image,
            store_cost=total * bytes_per_image / 1e9 * config.assumed_storage_price,
            files=number,
            manifest_bytes=listed_bytes,
            driver_bytes=driver,
            bends=_bends(listed_bytes, driver, number, config),
        )

    return ScaleBenchmark(
        cpu_rate=cpu_rate,
        gpu_rate=gpu_rate,
        gpu_bottleneck="the GPU" if gpu_rate < decoding else "decoding on its CPUs",
        data_sets=[scale(name, total) for name, total in DATA_SETS.items()],
    )


def _bends(manifest: float, driver: float, files: float, config: BenchmarkScaleConfig) -> str:
    """Limits, the one that is passed by most first."""
    passed = {
        "ids in the driver's memory": driver / (config.driver_memory_gib * 2**30 / 2),
        # One listing returns a thousand names; a hundred thousand take some tens of seconds.
        "small files": files / 100_000,
        "manifest": manifest / 100e6,
    }
    worst = max(passed, key=lambda name: passed[name])
    return worst if passed[worst] > 1 else "nothing"
