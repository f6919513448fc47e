"""Learning curves."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from captioner.plots.render import DPI, FAINT, GREY, INK, font, to_png

TRAIN, VALIDATION = "#3b6fb6", "#d1603d"


def plot_history(history: Sequence[object], best_epoch: int | None = None) -> bytes:
    """Loss and accuracy over the epochs, side by side; and CIDEr-D where captions were scored.

    Args:
        history: one record per epoch, with the attributes ``epoch``, ``train_loss``, ``validation_loss`` (nats per
            token), ``train_accuracy`` and ``validation_accuracy`` (teacher-forced, fractions), and
            ``validation_cider``. A value may be None or nan; the curve has a gap there.
        best_epoch: the ``epoch`` to mark.

    Returns:
        A PNG.

    Raises:
        ValueError: the history is empty.
    """
    return to_png(draw_history(history, best_epoch))


def draw_history(history: Sequence[object], best_epoch: int | None = None) -> Figure:
    """The figure of ``plot_history``."""
    if not history:
        raise ValueError("the history is empty")
    epochs = _column(history, "epoch")
    best = None if best_epoch is None else int(np.flatnonzero(epochs == best_epoch)[0])
    scored = not np.isnan(_column(history, "validation_cider")).all()

    figure = Figure(figsize=(15 if scored else 10, 3.9), dpi=DPI, layout="constrained")
    loss, accuracy, *more = figure.subplots(1, 3 if scored else 2)
    for axes in more:
        cider = _column(history, "validation_cider")
        axes.plot(epochs, cider, color=VALIDATION, label="validation, greedy", marker=".")
        _dress(axes, "CIDEr-D")
    for axes, quantity, label in (
        (loss, "loss", "Loss (nats per token)"),
        (accuracy, "accuracy", "Accuracy (next word, teacher-forced)"),
    ):
        for split, color in (("train", TRAIN), ("validation", VALIDATION)):
            values = _column(history, f"{split}_{quantity}")
            axes.plot(epochs, values, color=color, label=split, linewidth=1.8, marker=".")
            if best is not None and split == "validation" and not np.isnan(values[best]):
                axes.axvline(
                    epochs[best], color=GREY, linewidth=0.9, linestyle=(0, (4, 3)), zorder=0
                )
                axes.plot(epochs[best], values[best], "o", color=color, markersize=7)
                number = f"{values[best]:.3f}" if quantity == "loss" else f"{values[best]:.1%}"
                name = f"best epoch {epochs[best]:g}: {number}"
                axes.plot([], [], "o", color=color, markersize=7, label=name)
        _dress(axes, label)
    accuracy.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    return figure


def _column(history: Sequence[object], name: str) -> NDArray[np.float64]:
    values = (getattr(record, name) for record in history)
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def _dress(axes: Axes, label: str) -> None:
    axes.set_title(label, fontproperties=font(11, "bold"), color=INK, loc="left")
    axes.set_xlabel("Epoch", fontproperties=font(9), color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=GREY, labelcolor=INK, labelsize=9, labelfontfamily=font(9).get_name())
    axes.legend(prop=font(9), frameon=False)
