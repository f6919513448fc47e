"""What all figures share: fonts, colours, text that is taken literally and fits, and the PNG at the end.

Figures are made on matplotlib's object interface, which has no global state and is safe in threads.
"""

import textwrap
from functools import cache
from io import BytesIO
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.textpath import TextToPath
from PIL import Image

# Comes with matplotlib, so that a picture looks the same on every machine.
FAMILY = "DejaVu Sans"
DPI = 110
INK, GREY, FAINT = "#1a1a1a", "#6f6f6f", "#d9d9d9"


def to_png(figure: Figure) -> bytes:
    """The figure as a PNG; equal figures give equal bytes."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


@cache
def font(size: float, weight: str = "normal") -> FontProperties:
    """The family at a size in points."""
    return FontProperties(family=FAMILY, size=size, weight=weight)


def ink(properties: FontProperties, color: str = INK) -> dict[str, Any]:
    """Options of a text that is taken literally: a dollar sign starts no formula."""
    return {"fontproperties": properties, "color": color, "parse_math": False}


@cache
def _characters(weight: str) -> frozenset[int]:
    return frozenset(get_font(findfont(font(10, weight))).get_charmap())


def fit(text: str, width: float, properties: FontProperties, max_lines: int) -> str:
    """``text`` in lines of at most ``width`` inches; what is past ``max_lines`` becomes an ellipsis.

    Characters that the font lacks become U+FFFD.
    """
    known = _characters(str(properties.get_weight()))
    text = "".join(c if ord(c) in known else "\ufffd" for c in " ".join(text.split()))
    columns = len(text)
    while True:
        lines = textwrap.wrap(text, max(columns, 1))
        if len(lines) > max_lines:
            lines[max_lines - 1 :] = [lines[max_lines - 1][: columns - 1].rstrip() + "\u2026"]
        excess = max((_width(line, properties) for line in lines), default=0.0) / width
        if excess <= 1 or columns <= 1:
            return "\n".join(lines)
        # Little by little: the widest line of these need not be that of the next.
        columns = min(columns - 1, int(1.1 * columns / excess))


def _width(line: str, properties: FontProperties) -> float:
    """In inches."""
    width, _, _ = TextToPath().get_text_width_height_descent(line, properties, ismath=False)
    return float(width) / 72


def dress(axes: Axes, title: str, xlabel: str = "") -> None:
    """The look of a diagram."""
    axes.set_xlabel(xlabel, **ink(font(9)))
    axes.set_title(title, loc="left", **ink(font(10, "bold")))
    axes.grid(color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=GREY, labelcolor=INK, labelsize=9, labelfontfamily=FAMILY)


def open_picture(data: bytes) -> Image.Image:
    """A thumbnail, RGB."""
    return Image.open(BytesIO(data)).convert("RGB")
