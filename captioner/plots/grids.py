"""Grids of photographs with the captions a model gave them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from captioner.plots.render import DPI, FAINT, GREY, font, line_height, to_png, wrap, write

Image = NDArray[np.uint8]

# Inches.
MARGIN, GAP, PICTURE_WIDTH, PICTURE_HEIGHT = 0.25, 0.25, 3.0, 2.25
HEADING, CAPTION, REFERENCE, NOTE = font(14, "bold"), font(10, "bold"), font(7.5), font(8)
MAX_HEADING_LINES, MAX_CAPTION_LINES, MAX_REFERENCE_LINES, MAX_REFERENCES = 3, 6, 3, 5


@dataclass(frozen=True)
class _Cell:
    """One photograph and the lines under it."""

    image: Image
    caption: list[str]
    references: list[list[str]]
    note: str | None

    @property
    def picture_height(self) -> float:
        """Height of the photograph as drawn, in inches; its proportions are kept."""
        height, width, _ = self.image.shape
        return float(min(PICTURE_HEIGHT, PICTURE_WIDTH * height / width))

    @property
    def text_height(self) -> float:
        """Height of everything under the photograph, in inches."""
        height = 0.08 + len(self.caption) * line_height(CAPTION)
        if self.note is not None:
            height += line_height(NOTE)
        for reference in self.references:
            height += 0.03 + len(reference) * line_height(REFERENCE)
        return height


@dataclass(frozen=True)
class _Section:
    heading: list[str]
    rows: list[list[_Cell]]

    @property
    def height(self) -> float:
        heading = len(self.heading) * line_height(HEADING) + 0.12 if self.heading else 0.0
        return heading + sum(sum(_heights(row)) + GAP for row in self.rows)


def caption_grid(
    images: Sequence[Image],
    captions: Sequence[str],
    references: Sequence[Sequence[str]] | None = None,
    columns: int = 4,
    title: str | None = None,
) -> bytes:
    """Photographs with their captions in bold and, in small grey print, what people wrote.

    Args:
        images: uint8 [height, width, 3], RGB, of any sizes.
        captions: one per image, of any length.
        references: human captions of each image; at most five of them are shown.
        columns: photographs per row.
        title: heading over the grid.

    Returns:
        A PNG.

    Raises:
        ValueError: nothing to draw, or lists of unequal lengths.
    """
    _check(images, captions, references)
    cells = _cells(range(len(images)), images, captions, references, None)
    return _draw([_section(title, cells, columns)], min(columns, len(images)))


def best_and_worst(
    images: Sequence[Image],
    captions: Sequence[str],
    references: Sequence[Sequence[str]] | None,
    scores: Sequence[float],
    score_name: str = "CIDEr-D",
    count: int = 8,
    columns: int = 4,
) -> bytes:
    """Two grids in one picture: the ``count`` highest and the ``count`` lowest scores, the extreme first.

    No photograph is in both. Only those drawn are taken from ``images``, so a lazy sequence decodes no others.

    Args:
        images, captions, references: as for :func:`caption_grid`.
        scores: one per image, higher is better; equal scores keep the order of the images.
        score_name: what the scores are, for the labels.
        count: photographs in each grid; fewer when there are not twice as many images.
        columns: photographs per row.

    Returns:
        A PNG.

    Raises:
        ValueError: nothing to draw, lists of unequal lengths, or a score that is not a number.
    """
    _check(images, captions, references)
    if len(scores) != len(images):
        raise ValueError(f"{len(images)} images need as many scores, got {len(scores)}")
    if np.isnan(np.asarray(scores, dtype=np.float64)).any():
        raise ValueError("scores must be numbers, got nan")
    ranked = sorted(range(len(scores)), key=lambda index: -scores[index])
    count = min(count, (len(ranked) + 1) // 2)
    best, worst = ranked[:count], ranked[count:][::-1][:count]
    sections = []
    for name, chosen in (("Highest", best), ("Lowest", worst)):
        if chosen:
            notes = [f"{score_name} {scores[index]:.3f}" for index in chosen]
            cells = _cells(chosen, images, captions, references, notes)
            sections.append(_section(f"{name} {score_name}", cells, columns))
    return _draw(sections, min(columns, len(best)))


def _check(
    images: Sequence[Image],
    captions: Sequence[str],
    references: Sequence[Sequence[str]] | None,
) -> None:
    if not len(images):
        raise ValueError("there are no images to draw")
    if len(captions) != len(images):
        raise ValueError(f"{len(images)} images need as many captions, got {len(captions)}")
    if references is not None and len(references) != len(images):
        raise ValueError(f"{len(images)} images need as many references, got {len(references)}")


def _cells(
    indices: Sequence[int],
    images: Sequence[Image],
    captions: Sequence[str],
    references: Sequence[Sequence[str]] | None,
    notes: Sequence[str] | None,
) -> Iterator[_Cell]:
    for place, index in enumerate(indices):
        shown = () if references is None else references[index][:MAX_REFERENCES]
        yield _Cell(
            image=images[index],
            caption=wrap(captions[index] or "(empty)", PICTURE_WIDTH, CAPTION, MAX_CAPTION_LINES),
            references=[
                wrap(reference, PICTURE_WIDTH, REFERENCE, MAX_REFERENCE_LINES)
                for reference in shown
            ],
            note=None if notes is None else notes[place],
        )


def _width(columns: int) -> float:
    return columns * PICTURE_WIDTH + (columns - 1) * GAP


def _section(heading: str | None, cells: Iterator[_Cell], columns: int) -> _Section:
    listed = list(cells)
    rows = [listed[start : start + columns] for start in range(0, len(listed), columns)]
    width = _width(min(columns, len(listed)))
    return _Section(wrap(heading, width, HEADING, MAX_HEADING_LINES) if heading else [], rows)


def _heights(row: list[_Cell]) -> tuple[float, float]:
    """Room that the photographs of a row and the text under them need."""
    return max(cell.picture_height for cell in row), max(cell.text_height for cell in row)


def _draw(sections: list[_Section], columns: int) -> bytes:
    width = 2 * MARGIN + _width(columns)
    height = 2 * MARGIN - GAP + sum(section.height for section in sections)
    figure = Figure(figsize=(width, height), dpi=DPI)
    top = MARGIN
    for section in sections:
        for line in section.heading:
            write(figure, (MARGIN, top), line, HEADING)
            top += line_height(HEADING)
        top += 0.12 if section.heading else 0.0
        for row in section.rows:
            picture_height, text_height = _heights(row)
            for column, cell in enumerate(row):
                left = MARGIN + column * (PICTURE_WIDTH + GAP)
                _draw_cell(figure, left, top, picture_height, cell)
            top += picture_height + text_height + GAP
    return to_png(figure)


def _draw_cell(figure: Figure, left: float, top: float, picture_height: float, cell: _Cell) -> None:
    width, height = figure.get_size_inches()
    axes = figure.add_axes(
        (
            left / width,
            1 - (top + picture_height) / height,
            PICTURE_WIDTH / width,
            picture_height / height,
        ),
        anchor="SW",
    )
    axes.imshow(cell.image, interpolation="lanczos")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_color(FAINT)

    top += picture_height + 0.08
    for line in cell.caption:
        write(figure, (left, top), line, CAPTION)
        top += line_height(CAPTION)
    if cell.note is not None:
        write(figure, (left, top), cell.note, NOTE)
        top += line_height(NOTE)
    for reference in cell.references:
        top += 0.03
        for line in reference:
            write(figure, (left, top), line, REFERENCE, color=GREY)
            top += line_height(REFERENCE)
