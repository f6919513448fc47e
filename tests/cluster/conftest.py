"""One local Ray for all tests of this folder, as its starts, and those of its workers, are what takes longest."""

from collections.abc import Iterator

import pytest
import ray

from captioner.runtime.cluster import start_local_ray
from captioner.storage import S3_ADDRESS_VARIABLES

SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")


@pytest.fixture(scope="package")
def _ray_ends_with_the_folder() -> Iterator[None]:
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def local_ray(_ray_ends_with_the_folder: None) -> None:
    """A real local Ray that knows of no S3; its four logical CPUs need not be four cores.

    It is that of the module before, unless a test ended it to have one of its own.
    """
    if not ray.is_initialized():
        with pytest.MonkeyPatch.context() as patch:
            for name in (*S3_ADDRESS_VARIABLES, *SECRETS):
                patch.delenv(name, raising=False)
            start_local_ray(num_cpus=4, include_dashboard=False, log_to_driver=False)
