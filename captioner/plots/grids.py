"""Grids of pictures with the captions a model gave them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
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
        ("" if start else heading, [_Cell.of(one) for one in cells[start : start + columns]])
        for heading, cells in sections.items()
        for start in range(0, len(cells), columns)
    ]
    # Of each row: where its pictures end, and all of it.
    bottoms = [
        (HEADING_HEIGHT if heading else GAP / 2) + max(cell.size[1] for cell in cells)
        for heading, cells in rows
    ]
    heights = [
        bottom + GAP / 2 + max(cell.text_height for cell in cells)
        for bottom, (_, cells) in zip(bottoms, rows, strict=True)
    ]
    width = columns * (WIDTH + GAP) + GAP
    figure = Figure((width, sum(heights)), DPI)
    grid = figure.add_gridspec(len(rows), columns, height_ratios=heights, wspace=GAP / WIDTH)
    grid.update(left=GAP / width, right=1 - GAP / width, bottom=0, top=1, hspace=0)
    for row, (heading, cells) in enumerate(rows):
        for column, cell in enumerate(cells):
            axes = figure.add_subplot(grid[row, column])
            cell.draw(axes, bottoms[row])
            axes.set(xlim=(0, WIDTH), ylim=(heights[row], 0), aspect="auto")
            axes.set_axis_off()
            if not column:
                axes.text(0, HEADING_HEIGHT / 2, heading, va="center", **ink(HEADING))
    return to_png(figure)


@dataclass(frozen=True)
class _Cell:
    picture: Image.Image
    label: str
    """Written over the picture."""
    texts: list[tuple[str, FontProperties, str]]
    """Written below it, with fonts and colours."""

    @classmethod
    def of(cls, one: Captioned) -> "_Cell":
        texts = [(fit(one.caption or "(empty)", WIDTH, CAPTION, CAPTION_LINES), CAPTION, INK)]
        if one.note:
            texts.append((fit(one.note, WIDTH, NOTE, 1), NOTE, INK))
        for reference in one.references[:REFERENCES]:
            texts.append((fit(reference, WIDTH, REFERENCE, REFERENCE_LINES), REFERENCE, GREY))
        if one.thumbnail is None:
            label = fit(one.image_id, WIDTH - GAP, NOTE, CAPTION_LINES)
            return cls(Image.new("RGB", (4, 3), FAINT), label, texts)
        return cls(open_picture(one.thumbnail), "", texts)

    @property
    def size(self) -> tuple[float, float]:
        """Width and height of the picture in inches."""
        scale = min(WIDTH / self.picture.width, HEIGHT / self.picture.height)
        return scale * self.picture.width, scale * self.picture.height

    @property
    def text_height(self) -> float:
        """Inches."""
        return sum(
            (1.2 * properties.get_size_in_points() * (text.count("\n") + 1) + 4) / 72
            for text, properties, _ in self.texts
        )

    def draw(self, axes: Axes, bottom: float) -> None:
        """Draw the picture above and the texts below ``bottom``, on axes in inches."""
        width, height = self.size
        extent = (0, width, bottom, bottom - height)
        axes.imshow(self.picture, interpolation="lanczos", extent=extent)
        middle = (width / 2, bottom - height / 2)
        axes.text(*middle, self.label, ha="center", va="center", **ink(NOTE, GREY))
        position: dict[str, Any] = {"xy": (0, bottom), "xycoords": "data"}
        for text, properties, color in self.texts:
            # Each at the lower left corner of what is above it.
            written = axes.annotate(
                text,
                **position,
                xytext=(0, -4),
                textcoords="offset points",
                va="top",
                **ink(properties, color),
            )
            position = {"xy": (0, 0), "xycoords": written}
