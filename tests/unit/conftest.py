"""The unit tests' tensors are tiny: a second thread would only wait for the first."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)
