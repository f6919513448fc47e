"""Ray Data's settings for one job."""

from collections.abc import Iterator
from contextlib import contextmanager

from ray.data import DataContext


@contextmanager
def data_context() -> Iterator[DataContext]:
    """Settings of the datasets that are made while the block runs, a copy of those around it to be changed at will.

    Ray's own progress bars are off, of which a log file shows nothing; ``ProgressLine`` is for both.
    """
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    with DataContext.current(context):
        yield context
