"""What Ray Train tells Tune of a trial, and what Tune tells the screen."""

import logging
from collections import Counter
from typing import Any

from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.progress_reporter import TrialProgressCallback

from captioner.config import TuneConfig
from captioner.runtime.screen import SCREEN

logger = logging.getLogger(__name__)


class ReportEpochs(TuneReportCallback):
    """Hands epochs to Tune, and not the checkpoints within one."""

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any
    ) -> None:
        if metrics[0]:
            super().after_report(run_context, metrics, checkpoint)


class EpochLines(TrialProgressCallback):
    """A line in the log for every epoch of a trial, where Tune would print its results."""

    def __init__(self, config: TuneConfig, metric: str, number: int):
        """
        Args:
            number: of trials, which Tune makes one after the other.
        """
        super().__init__()
        self._epochs, self._judged_by, self._number = config.max_epochs, metric, number

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any
    ) -> None:
        stopped = result.get("done") and result["epoch"] < self._epochs
        logger.info(
            "%s | epoch %d/%d | %s %.4f%s",
            trial,
            result["epoch"],
            self._epochs,
            self._judged_by.replace("_", " "),
            result[self._judged_by],
            " | stopped" if stopped else "",
        )

    def on_step_end(self, iteration: int, trials: list[Any], **_: Any) -> None:
        found = Counter(trial.status for trial in trials)
        over = found["TERMINATED"] + found["ERROR"]
        SCREEN.pass_by(f"{over} of {self._number} trials over, {found['RUNNING']} running")

    def on_experiment_end(self, trials: list[Any], **_: Any) -> None:
        SCREEN.pass_by("", last=True)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        logger.warning("%s failed and is tried again", trial)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        logger.warning("%s failed", trial)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        logger.info("%s is over", trial)
