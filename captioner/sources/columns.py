"""Which columns of a table hold images' names, captions and splits, by the names that people give them."""

import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

from captioner.config import SourceConfig
from captioner.errors import SourceError

IMAGE_SUFFIX = re.compile(
    r".+\.(jpe?g|jpe|jfif|mpo|a?png|webp|gif|bmp|dib|tiff?|avif|heic|heif|hif)", re.I
)

_IMAGES = (
    "image", "image_path", "img_path", "path", "filepath", "file_path", "filename", "file_name", "image_name",
    "img_name", "image_file", "image_filename", "file", "img", "photo", "picture", "key", "image_id", "img_id", "name",
    "id",
)  # fmt: skip
_CAPTIONS = (
    "captions", "caption", "sentences_raw", "raw", "sentences", "sentence", "comments", "comment", "texts", "text",
    "txt", "descriptions", "description", "alt_text",
)  # fmt: skip
NO_CAPTIONS = "none"
TEXT_FIELDS = ("raw", "caption", "text", "sentence")
"""Of a record that is a caption."""
_SPLITS = ("split", "subset", "partition")


def normal(name: Any) -> str:
    """A column's name without case, blanks and punctuation."""
    return re.sub(r"[\W_]+", "_", str(name)).strip("_").lower()


def named(columns: Collection[str], asked: str, flag: str, place: str) -> str:
    """The column that a flag names, exactly or but for case and punctuation.

    Raises:
        SourceError: there is none.
    """
    if asked in columns:
        return asked
    for column in columns:
        if normal(column) == normal(asked):
            return column
    listed = ", ".join(columns) or "none"
    raise SourceError(
        f"{place}: no column {asked!r}, which source-options.{flag} names; its columns are {listed}"
    )


def column_flags(options: SourceConfig, *, but: Collection[str] = ()) -> list[str]:
    """The flags that name columns and are given, but for some."""
    flags = ("image_column", "caption_columns", "split_column", "id_column")
    given = (flag for flag in flags if getattr(options, flag) and flag not in but)
    return [f"source-options.{flag.replace('_', '-')}" for flag in given]


def find_image_column(
    columns: Sequence[str], options: SourceConfig, place: str, values: Callable[[str], list[Any]]
) -> str | None:
    """The column of images' names: the one asked for, else the first of a usual name whose values look like files',
    else any with such values, else one of a usual name.

    Args:
        values: gives some of a column's values.
    """
    if options.image_column is not None:
        return named(columns, options.image_column, "image-column", place)
    usual = [column for name in _IMAGES for column in columns if normal(column) == name]
    for column in [*usual, *columns]:
        seen = [value for value in values(column) if value]
        if seen and all(IMAGE_SUFFIX.fullmatch(str(value).strip()) for value in seen):
            return column
    return usual[0] if usual else None


def is_image_column(columns: Collection[str]) -> bool:
    """Whether one of the columns has a usual name of images' names."""
    return any(normal(column) in _IMAGES for column in columns)


def find_caption_columns(
    columns: Sequence[str], options: SourceConfig, place: str, fit: Callable[[str], bool]
) -> tuple[str, ...]:
    """The columns of captions, in order: those asked for, else one of a usual name, or all that number it
    (``caption_0``, ``caption 1``, ``caption2``), or it in a language (``caption_en``).

    Args:
        fit: whether a column's type or values can be captions.

    Raises:
        SourceError: there are several languages to choose from, or the columns asked for are not there.
    """
    if options.caption_columns:
        return tuple(
            named(columns, name, "caption-columns", place) for name in options.caption_columns
        )
    plain = {normal(column): column for column in reversed(columns)}
    for base in _CAPTIONS:
        numbered = sorted(
            (int(match[1]), column)
            for name, column in plain.items()
            if (match := re.fullmatch(rf"{base}_?(\d+)", name)) and fit(column)
        )
        family = [column for _, column in numbered]
        if base in plain and fit(plain[base]):
            return (plain[base], *family)
        if family:
            return tuple(family)
    for base in _CAPTIONS:
        languages = [
            column
            for name, column in plain.items()
            if re.fullmatch(rf"{base}_[a-z]{{2,3}}", name) and fit(column)
        ]
        if len(languages) > 1:
            raise SourceError(
                f"{place}: captions in columns {', '.join(sorted(languages))}: choose with "
                "source-options.caption-columns"
            )
        if languages:
            return tuple(languages)
    return ()


def find_split_column(
    columns: Sequence[str], options: SourceConfig, place: str, fit: Callable[[str], bool]
) -> str | None:
    """The column of splits' names."""
    if options.split_column is not None:
        return named(columns, options.split_column, "split-column", place)
    for name in _SPLITS:
        for column in columns:
            if normal(column) == name and fit(column):
                return column
    return None


def might_be_captions(column: str) -> bool:
    """Whether a column's name promises captions, whatever it holds."""
    return bool(re.fullmatch(rf"({'|'.join(_CAPTIONS[:5])})(_?\d+)?", normal(column)))


def texts_of(value: Any) -> list[str]:
    """The captions in a cell: text, lists of it, records with a field of it, or a list written as JSON."""
    if value is None:
        return []
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        for name in TEXT_FIELDS:
            if value.get(name) is not None:
                return texts_of(value[name])
        return []
    if isinstance(value, list | tuple):
        return [text for one in value for text in texts_of(one)]
    raise TypeError(f"{value!r} is not text")
