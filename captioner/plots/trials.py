"""The trials of a search: their learning curves, and what each hyperparameter did."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from captioner.plots.render import DPI, dress, font, to_png

BEST = "#d1603d"
# Colour and mark.
STATUSES = {
    "finished": ("#3b6fb6", "o"),
    "stopped": ("#9aa5b1", "x"),
    "failed": ("#8b1e3f", "X"),
    "unfinished": ("#b08d2f", "s"),
}
COLUMNS = 4
# Most numbers that stand side by side as choices; more are a range.
CHOICES = 6


class Trial(Protocol):
    """One trial, as far as it is drawn."""

    @property
    def number(self) -> int: ...
    @property
    def hyperparameters(self) -> Mapping[str, str | int | float]:
        """Of the same names in all trials."""

    @property
    def status(self) -> str:
        """A key of ``STATUSES``."""

    @property
    def curve(self) -> Sequence[tuple[int, float]]:
        """(epoch, metric) in order."""


def plot_trials(trials: Sequence[Trial], best: int, metric: str, *, largest: bool) -> bytes:
    """Learning curves on top, by status; below, the metric's best value against each hyperparameter that differs.

    Args:
        best: number of the best trial.
        metric: its name, for the labels.
        largest: whether a larger metric is better.

    Returns:
        A PNG.

    Raises:
        ValueError: there are no trials.
    """
    if not trials:
        raise ValueError("there are no trials")
    names = [
        name
        for name in trials[0].hyperparameters
        if len({trial.hyperparameters[name] for trial in trials}) > 1
    ]
    rows = -(-len(names) // COLUMNS)
    figure = Figure((11, 4.2 + 2.6 * rows), DPI, layout="constrained")
    grid = figure.add_gridspec(1 + rows, COLUMNS, height_ratios=[1.6, *[1.0] * rows])
    curves = figure.add_subplot(grid[0, :])
    # The best trial last, over the others.
    ordered = sorted(trials, key=lambda trial: trial.number == best)
    for trial in ordered:
        color, mark = _style(trial, best)
        curves.plot(*np.reshape(trial.curve, (-1, 2)).T, ".-", color=color)
        curves.plot(*np.reshape(trial.curve[-1:], (-1, 2)).T, mark, color=color, markersize=8)
    curves.plot([], [], "o-", color=BEST, label=f"best: trial {best}")
    there = {trial.status for trial in trials}
    for status, (color, mark) in STATUSES.items():
        if status not in there:
            continue
        curves.plot([], [], mark, color=color, linestyle="-", label=status)
    curves.legend(prop=font(9), frameon=False, ncols=4)
    curves.xaxis.set_major_locator(MaxNLocator(integer=True))
    dress(curves, f"{metric.replace('_', ' ')} of every trial", "Epoch")
    for place, name in enumerate(names):
        axes = figure.add_subplot(grid[1 + place // COLUMNS, place % COLUMNS])
        values = [trial.hyperparameters[name] for trial in ordered]
        places = _scale(axes, values)
        for trial, x in zip(ordered, places, strict=True):
            found = [value for _, value in trial.curve if np.isfinite(value)]
            if found:
                color, mark = _style(trial, best)
                axes.plot(x, max(found) if largest else min(found), mark, color=color, markersize=7)
        dress(axes, name.replace("_", " "))
    return to_png(figure)


def _style(trial: Trial, best: int) -> tuple[str, str]:
    return (BEST, "o") if trial.number == best else STATUSES[trial.status]


def _scale(axes: Axes, values: Sequence[str | int | float]) -> Sequence[str | int | float]:
    """Places of a hyperparameter's values on the x axis, which gets its scale and labels."""
    numbers = sorted({value for value in values if not isinstance(value, str)})
    names = sorted({value for value in values if isinstance(value, str)})
    if len(numbers) > CHOICES and not names:
        if numbers[0] > 0:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_locator(NullLocator())
        return values
    choices = [*numbers, *names]
    axes.set_xticks(range(len(choices)), [*(f"{value:g}" for value in numbers), *names])
    axes.set_xlim(-0.5, len(choices) - 0.5)
    if names:  # too wide to stand side by side
        axes.tick_params("x", labelrotation=20, labelrotation_mode="xtick")
    return [choices.index(value) for value in values]
