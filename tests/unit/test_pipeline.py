"""How many rows a run of Ray Data writes into a file."""

from captioner.artifacts.tables import feature_rows
from captioner.encoders.spec import FeatureShape
from captioner.features.pipeline import rows_per_file


def test_large_stores_have_about_a_thousand_files_that_fit_in_memory() -> None:
    vectors, grids = (
        feature_rows(FeatureShape(2048, 2048, 7, 7), grid=grid) for grid in (False, True)
    )
    assert rows_per_file(7_000, vectors) == 7
    assert rows_per_file(10, vectors) == 1
    assert rows_per_file(10_000_000, vectors) == 10_000
    assert rows_per_file(10_000_000, grids) * (4 * 2048 + 2 * 49 * 2048) <= 128 * 2**20
