"""Grids of pictures with the captions a model gave them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure, SubFigure
from matplotlib.font_manager import FontProperties
from PIL import Image

from captioner.plots.render import DPI, FAINT, GREY, INK, fit, font, ink, open_picture, to_png

# Inches: the most a picture takes, the room between two, and that of a heading.
WIDTH, HEIGHT, GAP, HEADING_HEIGHT = 3.0, 2.25, 0.25, 0.5
HEADING, CAPTION, NOTE, REFERENCE = font(14, "bold"), font(10, "bold"), font(8), font(7.5)
# Lines of a caption and of a reference, and references of a picture.
CAPTION_LINES, REFERENCE_LINES, REFERENCES = 6, 3, 5


@dataclass(frozen=True)
class Captioned:
    """A picture and what was written about it, in texts of any length."""

    image_id: str
    thumbnail: bytes | None
    """The picture, small, as a file; None: a grey field with the id is drawn."""
    caption: str
    references: Sequence[str] = ()
    """What people wrote; five of them are shown."""
    note: str = ""


def caption_grids(sections: Mapping[str, Sequence[Captioned]], columns: int = 4) -> bytes:
    """Pictures in their proportions, captions in bold below and, small and grey, what people wrote.

    Args:
        sections: grids below each other, by heading; "" is no heading, and an empty grid is left out.
        columns: pictures in a row.

    Returns:
        A PNG.

    Raises:
        ValueError: nothing to draw.
    """
    columns = min(columns, max(map(len, sections.values()), default=0))
    if not columns:
        raise ValueError("there are no pictures to draw")
    rows = [
        _Row("" if start else heading, [_cell(one) for one in cells[start : start + columns]])
        for heading, cells in sections.items()
        for start in range(0, len(cells), columns)
    ]
    heights = [row.height for row in rows]
    figure = Figure((columns * (WIDTH + GAP) + GAP, sum(heights)), DPI)
    parts = figure.subfigures(len(rows), 1, squeeze=False, height_ratios=heights)[:, 0]
    for part, row in zip(parts, rows, strict=True):
        row.draw(part, columns)
    return to_png(figure)


@dataclass(frozen=True)
class _Cell:
    """Sizes are inches."""

    picture: Image.Image
    label: str
    """Written over the picture."""
    texts: list[tuple[str, FontProperties, str]]
    """Written below it, with fonts and colours."""

    @property
    def picture_height(self) -> float:
        return min(HEIGHT, WIDTH * self.picture.height / self.picture.width)

    @property
    def text_height(self) -> float:
        return sum(
            (1.2 * properties.get_size_in_points() * (text.count("\n") + 1) + 4) / 72
            for text, properties, _ in self.texts
        )


def _cell(one: Captioned) -> _Cell:
    texts = [(fit(one.caption or "(empty)", WIDTH, CAPTION, CAPTION_LINES), CAPTION, INK)]
    if one.note:
        texts.append((fit(one.note, WIDTH, NOTE, 1), NOTE, INK))
    for reference in one.references[:REFERENCES]:
        texts.append((fit(reference, WIDTH, REFERENCE, REFERENCE_LINES), REFERENCE, GREY))
    if one.thumbnail is None:
        label = fit(one.image_id, WIDTH - GAP, NOTE, CAPTION_LINES)
        return _Cell(Image.new("RGB", (4, 3), FAINT), label, texts)
    return _Cell(open_picture(one.thumbnail), "", texts)


@dataclass(frozen=True)
class _Row:
    """Sizes are inches."""

    heading: str
    cells: list[_Cell]

    @property
    def top(self) -> float:
        return HEADING_HEIGHT if self.heading else GAP / 2

    @property
    def bottom(self) -> float:
        return GAP / 2 + max(cell.text_height for cell in self.cells)

    @property
    def height(self) -> float:
        return self.top + max(cell.picture_height for cell in self.cells) + self.bottom

    def draw(self, figure: SubFigure, columns: int) -> None:
        margin, height = GAP / (columns * (WIDTH + GAP) + GAP), self.height
        grid = figure.add_gridspec(
            1,
            columns,
            left=margin,
            right=1 - margin,
            bottom=self.bottom / height,
            top=1 - self.top / height,
            wspace=GAP / WIDTH,
        )
        figure.text(margin, 1 - self.top / 2 / height, self.heading, va="center", **ink(HEADING))
        for place, cell in enumerate(self.cells):
            axes = figure.add_subplot(grid[place], anchor="SW", xticks=[], yticks=[])
            axes.imshow(cell.picture, interpolation="lanczos")
            axes.spines[:].set_color(FAINT)
            axes.annotate(
                cell.label, (0.5, 0.5), xycoords="axes fraction", ha="center", **ink(NOTE, GREY)
            )
            above: Any = axes.transAxes
            for text, properties, color in cell.texts:
                # At the lower left corner of what is above it.
                above = axes.annotate(
                    text,
                    (0, 0),
                    xycoords=above,
                    xytext=(0, -4),
                    textcoords="offset points",
                    va="top",
                    **ink(properties, color),
                )
