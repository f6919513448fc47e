"""Where a decoder looked while it wrote each word."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from captioner.plots.render import DPI, GREY, fit, font, ink, open_picture, to_png

# Inches.
WIDTH, TEXT_HEIGHT, COLUMNS = 2.0, 0.5, 6
WORD, NOTE = font(11, "bold"), font(8)


def attention_maps(
    thumbnail: bytes,
    words: Sequence[str],
    attention: NDArray[np.floating],
    box: tuple[float, float, float, float] | None = None,
) -> bytes:
    """The picture, then one panel per word with the cells the decoder weighed most in colour.

    Each map is scaled to its own largest weight, which is printed below it: a weight of 1 / P there means that the
    decoder looked everywhere alike.

    Args:
        thumbnail: the picture, as a file.
        words: the caption's words, in order.
        attention: [words, rows, columns], weights over a grid of P = rows x columns cells, the sum of each grid 1.
        box: left, top, right and bottom edge of the grid, in the thumbnail's pixels; None: it covers all of it.

    Returns:
        A PNG.

    Raises:
        ValueError: attention is not one grid per word, or there are no words.
    """
    if not words or attention.ndim != 3 or len(attention) != len(words) or not attention.size:
        raise ValueError(f"{len(words)} words need one grid each, not {list(attention.shape)}")
    picture = open_picture(thumbnail)
    grey, (width, height) = picture.convert("L"), picture.size
    left, top, right, bottom = box or (0, 0, width, height)
    whole = (0, width, height, 0)
    columns = min(COLUMNS, 1 + len(words))
    rows = -(-(1 + len(words)) // columns)
    size = (columns * WIDTH, rows * (WIDTH * height / width + TEXT_HEIGHT))
    figure = Figure(size, DPI, layout="constrained")
    panels = [figure.add_subplot(rows, columns, 1 + place) for place in range(1 + len(words))]
    panels[0].imshow(picture, interpolation="lanczos", extent=whole)
    for axes, word, weights in zip(panels[1:], words, attention, strict=True):
        peak = float(weights.max())
        axes.set_title(fit(word, 0.9 * WIDTH, WORD, 1), loc="left", **ink(WORD))
        axes.set_xlabel(f"peak {peak:.1%}", loc="left", **ink(NOTE, GREY))
        # Grey and rather pale, so that the colours stand out.
        axes.imshow(grey, "gray", vmin=-50, vmax=290, interpolation="lanczos", extent=whole)
        axes.imshow(
            weights,
            "inferno",
            vmin=-peak / 3,
            vmax=peak or 1.0,
            alpha=0.7 * weights / (peak or 1.0),
            interpolation="gaussian",
            extent=(left, right, bottom, top),
        )
    for axes in panels:
        axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    return to_png(figure)
