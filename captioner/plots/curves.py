"""Learning curves."""

from collections.abc import Sequence
from typing import Protocol

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from captioner.plots.render import DPI, GREY, dress, font, to_png

TRAIN, VALIDATION = "#3b6fb6", "#d1603d"


class Epoch(Protocol):
    """One epoch: losses in nats per token, accuracies as fractions, both under teacher forcing."""

    @property
    def epoch(self) -> int: ...
    @property
    def train_loss(self) -> float | None: ...
    @property
    def train_accuracy(self) -> float | None: ...
    @property
    def train_cider(self) -> float | None:
        """Of drawn captions, where those were trained on; then loss and accuracy are None."""

    @property
    def validation_loss(self) -> float: ...
    @property
    def validation_accuracy(self) -> float: ...
    @property
    def validation_cider(self) -> float | None:
        """Of greedy captions; None, then of every epoch, where they were not scored."""


def plot_history(history: Sequence[Epoch], best_epoch: int) -> bytes:
    """Loss and accuracy over the epochs, side by side; and CIDEr-D where captions were scored.

    Args:
        best_epoch: the ``epoch`` to mark.

    Returns:
        A PNG.

    Raises:
        ValueError: the history is empty.
    """
    return to_png(draw_history(history, best_epoch))


def draw_history(history: Sequence[Epoch], best_epoch: int) -> Figure:
    """The figure of ``plot_history``."""
    if not history:
        raise ValueError("the history is empty")
    every: dict[str, dict[str, list[float | None]]] = {
        "Loss (nats per token)": {
            "train": [one.train_loss for one in history],
            "validation": [one.validation_loss for one in history],
        },
        "Accuracy (next word, teacher-forced)": {
            "train": [one.train_accuracy for one in history],
            "validation": [one.validation_accuracy for one in history],
        },
        "CIDEr-D": {
            "train, drawn": [one.train_cider for one in history],
            "validation, greedy": [one.validation_cider for one in history],
        },
    }
    panels: dict[str, dict[str, list[float]]] = {}
    for title, found in every.items():
        # A figure is there in every epoch or in none.
        told = {
            name: [value for value in values if value is not None]
            for name, values in found.items()
            if None not in values
        }
        if told:
            panels[title] = told
    epochs = [one.epoch for one in history]
    best = epochs.index(best_epoch)
    figure = Figure((5 * len(panels), 3.9), DPI, layout="constrained")
    for axes, (title, curves) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for name, values in curves.items():
            color = TRAIN if name.startswith("train") else VALIDATION
            axes.plot(epochs, values, ".-", color=color, label=name)
        label = f"best epoch {best_epoch}: {values[best]:.3f}"
        axes.plot(best_epoch, values[best], "o", color=VALIDATION, markersize=7, label=label)
        axes.axvline(best_epoch, color=GREY, linewidth=0.9, linestyle="--", zorder=1)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.legend(prop=font(9), frameon=False)
        dress(axes, title, "Epoch")
    return figure
