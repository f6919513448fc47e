"""Generated scenes with captions: a data set that needs no network and no disk.

A scene is decided by (seed, split, index) alone, so a read task draws its images and nothing is stored. Captions say only
what the picture shows: counts, sizes, colours, shapes, and where two kinds of objects are to each other.
"""

import io
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from urllib.parse import parse_qs, urlsplit

import pyarrow as pa
from PIL import Image, ImageDraw

from captioner.config import ShapesConfig
from captioner.errors import SourceError
from captioner.schema import CAPTION_ROWS, SPLITS, SourceIdentity
from captioner.sources.tasks import Piece, PieceSource, source_rows

SIDE = 160
ROWS_PER_PIECE = 100
_BYTES_PER_IMAGE = 1_500

COLOURS = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 90, 220),
    "yellow": (250, 210, 30),
    "purple": (140, 60, 190),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "star")
SIZES = {"small": 17, "large": 33}  # radius in pixels
COUNTS = ("", "one", "two", "three")
# relation, and the same seen from the second object
RELATIONS = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
_BACKGROUNDS = ((245, 245, 245), (226, 232, 240), (240, 230, 215))


@dataclass(frozen=True)
class Group:
    """Equal objects side by side."""

    count: int
    size: str
    colour: str
    shape: str

    def phrase(self, *, size: bool = True, article: bool = True) -> str:
        noun = self.shape if self.count == 1 else f"{self.shape}s"
        number = ("a" if article else "one") if self.count == 1 else COUNTS[self.count]
        return " ".join(word for word in (number, self.size if size else "", self.colour, noun) if word)


@dataclass(frozen=True)
class Scene:
    """One group, or two with a relation between them."""

    first: Group
    relation: str | None
    second: Group | None
    background: tuple[int, int, int]

    def captions(self) -> list[str]:
        """Five differing captions of the same facts."""
        first = self.first.phrase()
        verb = "is" if self.first.count == 1 else "are"
        if self.second is None or self.relation is None:
            return [
                f"There {verb} {first} in the picture.",
                f"{_capital(first)} in the picture.",
                f"A picture of {first}.",
                f"The picture shows {first}.",
                f"The picture shows {self.first.phrase(article=False)}.",
            ]
        second = self.second.phrase()
        where, back = _where(self.relation), _where(RELATIONS[self.relation])
        other = "is" if self.second.count == 1 else "are"
        return [
            f"There {verb} {first} {where} {second}.",
            f"{_capital(first)} {verb} {where} {second}.",
            f"{_capital(first)} {where} {second}.",
            f"The picture shows {first} {where} {second}.",
            f"{_capital(second)} {other} {back} {first}.",
        ]

    def draw(self, jitter: random.Random) -> bytes:
        """The scene as PNG."""
        image = Image.new("RGB", (2 * SIDE, 2 * SIDE), self.background)
        canvas = ImageDraw.Draw(image)
        centres = _centres(self.relation)
        for group, (x, y) in zip((self.first, self.second), centres, strict=False):
            if group is not None:
                _draw_group(canvas, group, x + jitter.uniform(-6, 6), y + jitter.uniform(-6, 6))
        output = io.BytesIO()
        # Drawn at twice the size, so that shrinking smooths the edges.
        image.resize((SIDE, SIDE), Image.Resampling.LANCZOS).save(output, "PNG")
        return output.getvalue()


def make_scene(seed: int, split: str, index: int) -> tuple[Scene, bytes]:
    """The scene of one index, and its picture."""
    # A string seed is hashed by SHA-512, the same on every machine and in every process.
    choose = random.Random(f"{seed}/{split}/{index}")

    def group() -> Group:
        return Group(
            choose.choice((1, 1, 2, 3)),
            choose.choice(tuple(SIZES)),
            choose.choice(tuple(COLOURS)),
            choose.choice(SHAPES),
        )

    first, second, relation = group(), None, None
    if choose.random() < 0.5:
        relation = choose.choice(tuple(RELATIONS))
        second = group()
        while (second.colour, second.shape) == (first.colour, first.shape):
            second = group()
    scene = Scene(first, relation, second, choose.choice(_BACKGROUNDS))
    return scene, scene.draw(choose)


class ShapesSource:
    """The generated data set."""

    def __init__(self, config: ShapesConfig, limit: int | None = None):
        self.config = config
        self.limit = limit

    def identity(self) -> SourceIdentity:
        return SourceIdentity(
            kind="shapes", uri="shapes", options=self.config.model_dump() | {"limit": self.limit}
        )

    def num_images(self) -> int:
        return sum(self._size(split) for split in SPLITS)

    def images(self) -> PieceSource:
        pieces = []
        for split in SPLITS:
            for start in range(0, self._size(split), ROWS_PER_PIECE):
                rows = min(ROWS_PER_PIECE, self._size(split) - start)
                read = partial(_read, self.config.seed, split, start, rows)
                pieces.append(Piece(read, rows, rows * _BYTES_PER_IMAGE))
        return PieceSource("Shapes", pieces)

    def captions(self) -> Iterator[pa.RecordBatch]:
        for split in SPLITS:
            rows = [
                {"image_id": _image_id(split, index), "caption": caption, "index": number}
                for index in range(self._size(split))
                for number, caption in enumerate(make_scene(self.config.seed, split, index)[0].captions())
            ]
            yield pa.RecordBatch.from_pylist(rows, CAPTION_ROWS)

    def _size(self, split: str) -> int:
        size: int = getattr(self.config, split)
        return size if self.limit is None else min(size, self.limit)


def read_scene(uri: str) -> bytes:
    """The picture behind ``shapes://split/index?seed=0``."""
    parts = urlsplit(uri)
    try:
        return make_scene(int(parse_qs(parts.query)["seed"][0]), parts.netloc, int(parts.path.strip("/")))[1]
    except (KeyError, ValueError) as error:
        raise SourceError(f"{uri} is not the URI of a generated scene") from error


def _image_id(split: str, index: int) -> str:
    return f"{split}-{index:06d}"


def _read(seed: int, split: str, start: int, rows: int) -> Iterator[pa.Table]:
    indices = range(start, start + rows)
    yield source_rows(
        [_image_id(split, index) for index in indices],
        [split] * rows,
        [f"shapes://{split}/{index}?seed={seed}" for index in indices],
        [make_scene(seed, split, index)[1] for index in indices],
        [None] * rows,
    )


def _capital(phrase: str) -> str:
    return phrase[0].upper() + phrase[1:]


def _where(relation: str) -> str:
    return relation if relation in ("above", "below") else f"to the {relation}"


def _centres(relation: str | None) -> list[tuple[float, float]]:
    near, middle, far = 0.5 * SIDE, 1.0 * SIDE, 1.5 * SIDE
    return {
        None: [(middle, middle)],
        "left of": [(near, middle), (far, middle)],
        "right of": [(far, middle), (near, middle)],
        "above": [(middle, near), (middle, far)],
        "below": [(middle, far), (middle, near)],
    }[relation]


def _draw_group(canvas: ImageDraw.ImageDraw, group: Group, x: float, y: float) -> None:
    radius = SIZES[group.size] * (1.0 if group.count == 1 else 0.85)
    # Side by side, two over one for three: a row of three would run into the other group.
    spread = 1.15 * radius
    places = {
        1: [(0.0, 0.0)],
        2: [(-spread, 0.0), (spread, 0.0)],
        3: [(-spread, -spread), (spread, -spread), (0.0, spread)],
    }[group.count]
    for dx, dy in places:
        _draw_shape(canvas, group.shape, x + dx, y + dy, radius, COLOURS[group.colour])


def _draw_shape(
    canvas: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float, fill: tuple[int, int, int]
) -> None:
    if shape == "circle":
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    elif shape == "square":
        half = 0.88 * radius
        canvas.rectangle((x - half, y - half, x + half, y + half), fill=fill)
    else:
        corners = 3 if shape == "triangle" else 10
        points = []
        for corner in range(corners):
            reach = radius * (0.42 if shape == "star" and corner % 2 else 1.1)
            angle = 2 * math.pi * corner / corners - math.pi / 2
            points.append((x + reach * math.cos(angle), y + reach * math.sin(angle)))
        canvas.polygon(points, fill=fill)
