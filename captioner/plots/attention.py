"""Where a decoder looked while it wrote each word."""

from collections.abc import Sequence
from math import isqrt

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from captioner.plots.render import DPI, GREY, font, line_height, to_png, wrap, write

# Inches; panels keep the proportions of the photograph.
MARGIN, GAP, PANEL_WIDTH, COLUMNS = 0.2, 0.15, 2.0, 6
WORD, NOTE = font(11, "bold"), font(7.5)
TEXT_HEIGHT = line_height(WORD) + line_height(NOTE) + 0.06


def attention_maps(
    image: NDArray[np.uint8],
    words: Sequence[str],
    attention: NDArray[np.floating],
) -> bytes:
    """The photograph, then one panel per word with the cells the decoder weighed most in colour.

    Each map is scaled to its own largest weight, which is printed under the word: a weight of 1 / P there
    means that the decoder looked everywhere alike.

    Args:
        image: uint8 [height, width, 3], RGB.
        words: the caption's words, in order.
        attention: [words, P], weights over a square grid of P cells in row-major order, each row of sum 1.

    Returns:
        A PNG.

    Raises:
        ValueError: attention is not one square grid per word.
    """
    attention = np.asarray(attention, dtype=np.float32)
    side = isqrt(attention.shape[-1]) if attention.ndim == 2 else 0
    if not len(words) or attention.shape != (len(words), side * side) or not side:
        raise ValueError(
            f"{len(words)} words need one square grid each, got attention {list(attention.shape)}"
        )
    panels: list[tuple[str, str, NDArray[np.uint8]]] = [("", "", image)]
    for word, weights in zip(words, attention, strict=True):
        grid = weights.reshape(side, side)
        panels.append((word, f"peak {weights.max():.1%}", _overlay(image, grid)))
    return _draw(panels, PANEL_WIDTH * image.shape[0] / image.shape[1])


def _overlay(image: NDArray[np.uint8], grid: NDArray[np.float32]) -> NDArray[np.uint8]:
    """``image`` in grey, coloured where ``grid``, smoothly enlarged to its size, is high."""
    height, width, _ = image.shape
    # Pillow's bicubic resize aligns the corners of the areas, as the cells of a convolutional grid do.
    enlarged = Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC)
    peak = float(grid.max())
    weights = np.clip(np.asarray(enlarged) / peak, 0, 1) if peak > 0 else np.zeros((height, width))
    grey = np.asarray(Image.fromarray(image).convert("L"), dtype=np.float32)[..., None] / 255
    colour = colormaps["inferno"](0.25 + 0.7 * weights)[..., :3]
    opacity = 0.65 * weights[..., None]
    mixed = (1 - opacity) * (0.15 + 0.75 * grey) + opacity * colour
    return np.asarray(np.rint(255 * mixed), dtype=np.uint8)


def _draw(panels: list[tuple[str, str, NDArray[np.uint8]]], panel_height: float) -> bytes:
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    width = 2 * MARGIN + columns * PANEL_WIDTH + (columns - 1) * GAP
    height = 2 * MARGIN + rows * (panel_height + TEXT_HEIGHT) + (rows - 1) * GAP
    figure = Figure(figsize=(width, height), dpi=DPI)
    for index, (word, note, picture) in enumerate(panels):
        row, column = divmod(index, columns)
        left = MARGIN + column * (PANEL_WIDTH + GAP)
        top = MARGIN + row * (panel_height + TEXT_HEIGHT + GAP)
        write(figure, (left, top), wrap(word, PANEL_WIDTH, WORD, 1)[0], WORD)
        write(figure, (left, top + line_height(WORD)), note, NOTE, color=GREY)
        bottom = 1 - (top + TEXT_HEIGHT + panel_height) / height
        axes = figure.add_axes((left / width, bottom, PANEL_WIDTH / width, panel_height / height))
        axes.imshow(picture, interpolation="lanczos", aspect="auto")
        axes.set_axis_off()
    return to_png(figure)
