"""Figures in memory and literal text in them, on matplotlib's object interface (no global state, safe in threads)."""

from functools import cache
from io import BytesIO
from typing import Any

from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.textpath import TextToPath

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


@cache
def _glyphs(weight: str) -> frozenset[int]:
    return frozenset(get_font(findfont(font(10, weight))).get_charmap())


def literal(text: str, weight: str = "normal") -> str:
    """``text`` on one line, each character that the font cannot draw replaced by U+FFFD."""
    known = _glyphs(weight)
    return "".join(c if ord(c) in known else "\ufffd" for c in " ".join(text.split()))


def text_width(text: str, properties: FontProperties) -> float:
    """Width of a line in inches."""
    width, _, _ = TextToPath().get_text_width_height_descent(text, properties, ismath=False)
    return float(width) / 72


def wrap(text: str, width: float, properties: FontProperties, max_lines: int) -> list[str]:
    """Break ``text`` into lines of at most ``width`` inches; past ``max_lines`` it ends in an ellipsis.

    Lines are measured in the font they are drawn in. A word wider than a line is broken inside.
    """
    lines = [""]
    for word in literal(text, str(properties.get_weight())).split(" "):
        longer = f"{lines[-1]} {word}".lstrip()
        if text_width(longer, properties) <= width:
            lines[-1] = longer
            continue
        if lines[-1]:
            lines.append("")
        for character in word:
            if lines[-1] and text_width(lines[-1] + character, properties) > width:
                lines.append("")
            lines[-1] += character
        if len(lines) > max_lines:
            break
    if len(lines) <= max_lines:
        return lines
    last = lines[max_lines - 1]
    while last and text_width(last + "\u2026", properties) > width:
        last = last[:-1]
    return [*lines[: max_lines - 1], last.rstrip() + "\u2026"]


def line_height(properties: FontProperties) -> float:
    """Distance between lines in inches."""
    return 1.3 * float(properties.get_size_in_points()) / 72


def write(
    figure: Figure,
    position: tuple[float, float],
    text: str,
    properties: FontProperties,
    **options: Any,
) -> None:
    """Draw one line of ``text`` with its upper left corner at ``position``, in inches from the upper left.

    The text is taken literally: a dollar sign starts no formula.
    """
    width, height = figure.get_size_inches()
    options = {"color": INK, "ha": "left", "va": "top", **options}
    figure.text(
        position[0] / width,
        1 - position[1] / height,
        literal(text, str(properties.get_weight())),
        fontproperties=properties,
        parse_math=False,
        **options,
    )
