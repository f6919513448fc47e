"""Features of a split that are all at hand."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from captioner.config import TrainConfig
from captioner.decoders.base import Features
from captioner.encoders.spec import Column
from captioner.training.data import CaptionData, Done, Pass, units_to_judge, units_to_learn
from captioner.training.plan import Indices, Plan, epoch_plan, sequential_plan
from captioner.training.views import moments, pick, sample_views


class Resident:
    """All features of a split in memory, or in files mapped to it."""

    def __init__(
        self,
        data: CaptionData,
        views: Sequence[Features],
        config: TrainConfig,
        rank: int,
        workers: int,
    ):
        """
        Args:
            views: columns of all images of the split, in the order of ids: of the images themselves, then of each of
                their other views.
        """
        self.data, self.views, self.config = data, views, config
        self.rank, self.workers = rank, workers

    def epoch(self, number: int, done: Sequence[Done] = ()) -> Pass:
        units, batch = units_to_learn(self.data, self.config)
        seed = self.config.seed
        plan = epoch_plan(units, self.data.lengths, batch, number, seed, self.workers)
        # The steps are the same for any number of workers.
        plan = plan[sum(part.steps for part in done) :]
        return self._pass(plan, sample_views(self.data, len(self.views), seed, number))

    def ordered(self, *, images: int | None = None) -> Pass:
        units, batch = units_to_judge(self.data, self.config, images)
        return self._pass(sequential_plan(units, self.data.lengths, batch, self.workers), None)

    def statistics(self, column: Column) -> tuple[Tensor, Tensor]:
        return moments(iter(torch.split(self.views[0][column], 512)))

    def _pass(self, plan: Plan, shown: Indices | None) -> Pass:
        def read(images: list[Indices]) -> Iterator[Features]:
            for rows in images:
                yield pick(self.views, rows, None if shown is None else shown[rows])

        return Pass(self.data, plan, self.rank, read)
