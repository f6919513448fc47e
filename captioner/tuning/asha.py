"""ASHA that remembers: which trials of a search go on, decided as if it had never been interrupted."""

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

from captioner.config import TuneConfig

Curve = Sequence[tuple[int, float]]
"""(epoch, metric) in order, epochs counted from 1."""


class RememberingASHA(FIFOScheduler):
    """Ray Tune's ASHA over trials known by their numbers, whose rungs are filled from the trials' own histories.

    Tune keeps nothing of what its schedulers knew of a search: continued with empty rungs, it would let trials go on
    that it would have stopped.
    """

    def __init__(
        self,
        config: TuneConfig,
        metric: str,
        mode: str,
        curves: Mapping[int, Curve],
        stopped: Callable[[int, int], None],
    ):
        """
        Args:
            mode: ``min`` or ``max``.
            curves: by number of the trial, the epochs about which there is nothing left to decide.
            stopped: is told of a trial's number and epochs when it is stopped, before anything is done about it.
        """
        super().__init__()
        self._judged_by, self._last, self._stopped = metric, config.max_epochs, stopped
        self._asha = ASHAScheduler(
            time_attr="epoch",
            metric=metric,
            mode=mode,
            max_t=config.max_epochs + 1,
            grace_period=min(config.grace_epochs, config.max_epochs),
            reduction_factor=config.reduction_factor,
        )
        for number, curve in curves.items():
            for epoch, value in curve:
                self.judge(number, epoch, value)

    def judge(self, number: int, epoch: int, value: float) -> str:
        """ASHA's decision on a trial after one of its epochs, which it takes note of; of a known one CONTINUE."""
        # By the number: Tune's ids of the trials are others after a restart.
        trial = SimpleNamespace(trial_id=number)
        self._asha.on_trial_add(None, trial)
        result = {"epoch": epoch, self._judged_by: value}
        decision: str = self._asha.on_trial_result(None, trial, result)
        return decision

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        # Tune repeats the last result of a trial that ends, of one without results an empty one.
        if self._judged_by not in result:
            return str(self.CONTINUE)
        number, epoch = trial.config["trial"]["number"], result["epoch"]
        # After its last epoch a trial ends by itself, with its model published.
        if self.judge(number, epoch, result[self._judged_by]) == self.STOP and epoch < self._last:
            self._stopped(number, epoch)
            return str(self.STOP)
        return str(self.CONTINUE)
