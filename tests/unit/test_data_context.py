"""What one job sets of Ray Data, no other job meets."""

import contextlib
from pathlib import Path

from ray.data import DataContext, ExecutionResources
from ray.data.checkpoint import CheckpointConfig

from captioner.runtime.data_context import data_context


def test_settings_of_a_job_end_with_it_even_when_it_fails(tmp_path: Path) -> None:
    before = DataContext.get_current()
    before.enable_progress_bars = True
    with contextlib.suppress(RuntimeError), data_context() as context:
        assert DataContext.get_current() is context
        assert not context.enable_progress_bars
        context.checkpoint_config = CheckpointConfig(id_column="id", checkpoint_path=str(tmp_path))
        context.execution_options.resource_limits = ExecutionResources.for_limits(
            object_store_memory=2**20
        )
        raise RuntimeError("the job failed")
    after = DataContext.get_current()
    assert after is before
    assert after.enable_progress_bars
    assert after.checkpoint_config is None
    assert after.execution_options.resource_limits.object_store_memory == float("inf")


def test_settings_around_a_job_hold_in_it() -> None:
    around = DataContext.get_current()
    assert around.target_max_block_size != 12_345
    with data_context() as outer:
        outer.target_max_block_size = 12_345
        with data_context() as inner:
            assert inner.target_max_block_size == 12_345
