"""Tables that people write: CSV, TSV and their kin, with proper quotation or without, as rows of cells."""

import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass

from captioner.errors import SourceError
from captioner.sources.columns import IMAGE_SUFFIX

_SEPARATOR = re.compile(r'("?)sep=(.)\1\n', re.I)  # Excel's first line
# Kaggle's Flickr30k numbers the captions of an image, and lacks the bar after the number in line 20,001.
_NUMBER_THEN_TEXT = re.compile(r"\s*(\d+)\s+(\S.*)", re.S)


@dataclass(frozen=True)
class Table:
    """Cells as they were found, before each row is brought to the width of the first."""

    name: str
    delimiter: str
    columns: list[str]
    lines: list[tuple[int, list[str]]]
    """The number of a row's first line, and its cells."""

    def rows(self, wide: str) -> Iterator[tuple[int, dict[str, str]]]:
        """Each row by column, with its line.

        Args:
            wide: the column that takes back what delimiters without quotation cut off.

        Raises:
            SourceError: a line has too few cells.
        """
        place = self.columns.index(wide)
        for line, cells in self.lines:
            surplus = len(cells) - len(self.columns)
            if surplus == -1 and (match := _NUMBER_THEN_TEXT.fullmatch(cells[-1])):
                cells = [*cells[:-1], match[1], match[2]]
            elif surplus < 0:
                raise SourceError(
                    f"{self.name}, line {line}: expected {len(self.columns)} columns, found {len(cells)}"
                )
            elif surplus:
                text = self.delimiter.join(cells[place : place + surplus + 1])
                cells = [*cells[:place], text, *cells[place + surplus + 1 :]]
            yield (
                line,
                {name: cell.strip() for name, cell in zip(self.columns, cells, strict=True)},
            )

    def some(self, column: str) -> list[str]:
        """Values of a column in the first rows."""
        place = self.columns.index(column)
        return [cells[place].strip() for _, cells in self.lines[:100] if place < len(cells)]


def read_table(name: str, text: str, *, columns: int | None = None) -> Table:
    """Read a table; its delimiter is told from its first line.

    Quotation as spreadsheets write it is undone where the whole file keeps to it; else only cells quoted from end to
    end are, and every other mark belongs to the text.

    Args:
        text: with ``\\n`` at the ends of its lines.
        columns: how many there are at least, where no line names them; they are then called 1, 2 ...
    """
    body = text.lstrip("\n")
    skipped = len(text) - len(body)
    delimiter = None
    if match := _SEPARATOR.match(body):
        delimiter, body, skipped = match[2], body[match.end() :], skipped + 1
    first = body.partition("\n")[0]
    delimiter = delimiter or max("\t,|;", key=first.count)
    found = _strictly(body, delimiter) or _leniently(body, delimiter)
    rows = [(line + skipped, cells) for line, cells in found if any(map(str.strip, cells))]
    if not rows:
        return Table(name, delimiter, [], [])
    width = len(rows[0][1])
    if all(len(cells) == width + 1 and not cells[-1].strip() for _, cells in rows[1:]):
        # A delimiter at the end of every line but the first.
        rows[1:] = [(line, cells[:-1]) for line, cells in rows[1:]]
    if columns is not None:
        width = max(columns, min(len(cells) for _, cells in rows))
        return Table(name, delimiter, [str(number + 1) for number in range(width)], rows)
    # A name that is given twice would hide the first of its columns.
    names: list[str] = []
    for number, cell in enumerate(rows[0][1], 1):
        column = cell.strip()
        names.append(column if column and column not in names else f"column {number}")
    return Table(name, delimiter, names, rows[1:])


def _strictly(text: str, delimiter: str) -> list[tuple[int, list[str]]] | None:
    """By the rules of CSV; None where they do not hold."""
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True
    )
    rows: list[tuple[int, list[str]]] = []
    line = 1
    try:
        for cells in reader:
            for cell in cells:
                # A stray mark opens a cell that goes on to the next mark, rows later.
                for below in cell.split("\n")[1:]:
                    if any(IMAGE_SUFFIX.fullmatch(part.strip()) for part in below.split(delimiter)):
                        return None
            rows.append((line, cells))
            line = reader.line_num + 1
    except csv.Error:
        return None
    return rows if len({len(cells) for _, cells in rows if cells}) == 1 else None


def _leniently(text: str, delimiter: str) -> list[tuple[int, list[str]]]:
    """Line by line."""
    end = re.escape(delimiter)
    cell = re.compile(rf' *"(?P<quoted>(?:[^"]|"")*)" *(?={end}|$)|(?P<plain>[^{end}]*)')

    def cells(line: str) -> Iterator[str]:
        position = 0
        while position <= len(line):
            match = cell.match(line, position)
            assert match is not None  # the second alternative matches anything
            quoted = match["quoted"]
            yield match["plain"] if quoted is None else quoted.replace('""', '"')
            position = match.end() + 1

    return [(number, list(cells(line))) for number, line in enumerate(text.split("\n"), 1)]
