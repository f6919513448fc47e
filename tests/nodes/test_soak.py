"""A handful of the soak's rounds."""

from collections.abc import Iterator

import pytest
import ray

from tests.nodes import soak

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[soak.Ground]:
    ray.shutdown()
    with soak.ground(tmp_path_factory.mktemp("ground")) as found:
        yield found


@pytest.mark.parametrize("number", [0, 3])
def test_a_struck_job_loses_and_repeats_nothing(ground: soak.Ground, number: int) -> None:
    row = soak.run_round(ground, number)
    assert soak.is_sound(row), row
