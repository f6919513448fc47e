"""Scaling on paper: sizes are the store's own, times the rates', and what is assumed is said to be."""

from pathlib import Path

import pytest

from benchmarks.config import BenchmarkScaleConfig
from benchmarks.scale import DATA_SETS, _bends, benchmark_scale
from captioner.errors import StoreError
from tests.stores import write_store


@pytest.fixture
def config(tmp_path: Path) -> BenchmarkScaleConfig:
    store = write_store(tmp_path / "store", {"train": 30, "validation": 10}, files=4)
    return BenchmarkScaleConfig(features=store, images_per_second=50, loaded_per_second=200, cpus=2)


def test_sizes_follow_from_the_store_and_times_from_the_rates(config: BenchmarkScaleConfig) -> None:
    result = benchmark_scale(config)
    assert result.cpu_rate == 50 / 2 * 16
    assert result.gpu_rate == 200 / 2 * 8  # below the GPU's assumed 2,000
    assert result.gpu_bottleneck == "decoding on its CPUs"
    files = list((Path(config.features) / "features").iterdir())
    images = 42  # with a rejected one in each split
    for one in result.data_sets:
        assert one.images == DATA_SETS[one.name]
        assert one.cpu_hours == pytest.approx(one.images / 400 / 3600)
        assert one.cpu_cost == pytest.approx(one.cpu_hours * config.assumed_node_price)
        size = sum(file.stat().st_size for file in files)
        assert one.store_bytes == pytest.approx(one.images * size / images)
        # As many rows in a file as here, until that would be over a thousand files.
        rows = max(images / len(files), one.images // 1000)
        assert one.files == pytest.approx(one.images / rows)
    table = result.table()
    assert "ASSUMED" in table
    assert all(name in table for name in DATA_SETS)


def test_design_bends_where_a_limit_is_passed_first(config: BenchmarkScaleConfig) -> None:
    bends = {one.name: one.bends for one in benchmark_scale(config).data_sets}
    assert bends["Flickr30k"] == "nothing"
    assert bends["1 billion"] == "ids in the driver's memory"
    roomy = config.model_copy(update={"driver_memory_gib": 4096})
    assert benchmark_scale(roomy).data_sets[-1].bends == "nothing"  # a thousand files
    assert _bends(1e6, 1e9, 200_000, config) == "small files"
    assert _bends(1e9, 1e9, 200_000, config) == "manifest"


def test_a_directory_that_is_no_store_is_refused(
    config: BenchmarkScaleConfig, tmp_path: Path
) -> None:
    with pytest.raises(StoreError, match="not a feature store"):
        benchmark_scale(config.model_copy(update={"features": str(tmp_path)}))
