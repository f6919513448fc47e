"""The trials of a search: their learning curves, and what each hyperparameter did."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullFormatter

from captioner.plots.render import DPI, FAINT, GREY, INK, font, to_png

BEST, FINISHED, STOPPED, FAILED = "#d1603d", "#3b6fb6", "#9aa5b1", "#8b1e3f"
COLUMNS = 4
# Most values of a hyperparameter that are drawn side by side, and most characters of their labels before they slant.
CHOICES, LABEL_CHARACTERS = 6, 34
# Distance of the numbers at the ends of curves, in points.
LABEL_POINTS = 6.0


@dataclass(frozen=True)
class TrialCurve:
    """One trial, as far as it is drawn."""

    number: int
    hyperparameters: dict[str, str | int | float]
    status: str
    """finished, stopped or failed."""
    curve: Sequence[tuple[int, float]]
    """(epoch, metric) in order."""


def plot_trials(trials: Sequence[TrialCurve], best: int, metric: str, *, largest: bool) -> bytes:
    """Learning curves on top, stopped trials grey with a cross at their end; below, the metric against each
    hyperparameter that differs between trials.

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
    figure = Figure(figsize=(11, 4.2 + 2.6 * rows), dpi=DPI, layout="constrained")
    grid = figure.add_gridspec(1 + rows, COLUMNS, height_ratios=[1.6, *[1.0] * rows])
    curves = figure.add_subplot(grid[0, :])
    label = metric.replace("_", " ")
    for trial in sorted(trials, key=lambda one: one.number == best):
        _draw_curve(curves, trial, trial.number == best)
    for text, color, marker in (
        (f"best: trial {best}", BEST, "."),
        ("finished", FINISHED, "."),
        ("stopped early", STOPPED, "x"),
        ("failed", FAILED, "X"),
    ):
        curves.plot([], [], color=color, marker=marker, label=text)
    curves.legend(prop=font(9), frameon=False, ncols=4)
    curves.xaxis.set_major_locator(MaxNLocator(integer=True))
    _dress(curves, f"{label} of every trial", "Epoch")
    for position, name in enumerate(names):
        axes = figure.add_subplot(grid[1 + position // COLUMNS, position % COLUMNS])
        _draw_effect(axes, trials, name, best, largest)
        _dress(axes, name.replace("_", " "), "")
    figure.draw_without_rendering()  # only now have the axes their size
    _label_ends(curves, trials, best)
    return to_png(figure)


def _color(trial: TrialCurve, best: bool) -> str:
    return BEST if best else {"finished": FINISHED, "failed": FAILED}.get(trial.status, STOPPED)


def _draw_curve(axes: Axes, trial: TrialCurve, best: bool) -> None:
    if not trial.curve:
        return
    epochs, values = zip(*trial.curve, strict=True)
    color = _color(trial, best)
    axes.plot(epochs, values, color=color, linewidth=2.4 if best else 1.3, marker=".")
    if trial.status != "finished":
        axes.plot(epochs[-1], values[-1], "x" if trial.status == "stopped" else "X", color=color)


def _label_ends(axes: Axes, trials: Sequence[TrialCurve], best: int) -> None:
    """The number of each trial at the end of its curve; above each other where curves end together."""
    low, high = axes.get_ylim()
    points = axes.get_window_extent().height * 72 / DPI / (high - low)
    ends: dict[int, list[tuple[float, TrialCurve]]] = {}
    for trial in trials:
        if not trial.curve:
            continue
        epoch, value = trial.curve[-1]
        if np.isfinite(value):
            ends.setdefault(epoch, []).append((value, trial))
    for epoch, labels in ends.items():
        labels.sort(key=lambda end: (end[0], end[1].number))
        places = spread([value * points for value, _ in labels], LABEL_POINTS)
        for place, (value, trial) in zip(places, labels, strict=True):
            axes.annotate(
                str(trial.number),
                (epoch, value),
                xytext=(4, place - value * points),
                textcoords="offset points",
                fontproperties=font(7.5),
                color=_color(trial, trial.number == best),
                va="center",
            )


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Ascending places moved until they lie ``gap`` apart: those too close are spread around their mean."""
    groups: list[list[float]] = []  # of each, its places in turn
    for place in places:
        groups.append([place])
        while len(groups) > 1 and _first(groups[-1], gap) < _last(groups[-2], gap) + gap:
            groups[-2:] = [groups[-2] + groups[-1]]
    return [_first(group, gap) + gap * number for group in groups for number in range(len(group))]


def _first(group: Sequence[float], gap: float) -> float:
    return sum(group) / len(group) - gap * (len(group) - 1) / 2


def _last(group: Sequence[float], gap: float) -> float:
    return _first(group, gap) + gap * (len(group) - 1)


def _draw_effect(
    axes: Axes, trials: Sequence[TrialCurve], name: str, best: int, largest: bool
) -> None:
    values = [trial.hyperparameters[name] for trial in trials]
    # A few choices stand side by side; what was drawn from a range has a scale.
    chosen = len(set(values)) <= CHOICES or any(isinstance(value, str) for value in values)
    choices = sorted(set(values), key=lambda value: str(value) if isinstance(value, str) else value)
    for trial in trials:
        found = [value for _, value in trial.curve if np.isfinite(value)]
        if not found:
            continue
        value = trial.hyperparameters[name]
        place = choices.index(value) if chosen else float(value)
        axes.plot(
            place,
            max(found) if largest else min(found),
            "o" if trial.status == "finished" else "x",
            color=_color(trial, trial.number == best),
            markersize=7 if trial.number == best else 5,
        )
    if chosen:
        labels = [one if isinstance(one, str) else f"{one:g}" for one in choices]
        # Long names are too wide to stand side by side.
        axes.set_xticks(range(len(choices)), labels)
        if sum(map(len, labels)) > LABEL_CHARACTERS:
            for label in axes.get_xticklabels():
                label.set(rotation=25, horizontalalignment="right")
        axes.set_xlim(-0.5, len(choices) - 0.5)
    elif name == "learning_rate":
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.xaxis.set_minor_formatter(NullFormatter())


def _dress(axes: Axes, title: str, below: str) -> None:
    axes.set_title(title, fontproperties=font(10, "bold"), color=INK, loc="left")
    axes.set_xlabel(below, fontproperties=font(9), color=INK)
    axes.grid(color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=GREY, labelcolor=INK, labelsize=8, labelfontfamily=font(8).get_name())
