"""Scenes of coloured shapes, their pictures and captions, all decided by (seed, split, index) alone.

Captions say only what the picture shows: counts, sizes, colours, shapes, and how two groups lie to each other. What a
caption says can be read back from it.
"""

import io
import math
import random
import re
from dataclasses import dataclass

from PIL import Image, ImageDraw

SIDE = 160

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
COUNTS = {1: "a", 2: "two", 3: "three"}
# relation, and the same seen from the second object
RELATIONS = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
_PHRASE = re.compile(
    r"\b({}) ({}) ({}) ({})s?\b".format(
        *("|".join(words) for words in (COUNTS.values(), SIZES, COLOURS, SHAPES))
    )
)
_BACKGROUNDS = ((245, 245, 245), (226, 232, 240), (240, 230, 215))


@dataclass(frozen=True)
class Group:
    """Equal objects side by side."""

    count: int
    size: str
    colour: str
    shape: str

    def phrase(self) -> str:
        noun = self.shape if self.count == 1 else f"{self.shape}s"
        return f"{COUNTS[self.count]} {self.size} {self.colour} {noun}"


@dataclass(frozen=True)
class Facts:
    """What is said of a scene: one group, or one left of or above another."""

    first: Group
    relation: str | None = None
    second: Group | None = None

    @classmethod
    def of(cls, first: Group, relation: str | None, second: Group | None) -> "Facts":
        """The same for either order of the groups."""
        if relation is None or second is None:
            return cls(first)
        if relation in ("right of", "below"):
            return cls(second, RELATIONS[relation], first)
        return cls(first, relation, second)

    @property
    def groups(self) -> tuple[Group, ...]:
        return (self.first,) if self.second is None else (self.first, self.second)


@dataclass(frozen=True)
class Scene:
    """One group, or two with a relation between them."""

    first: Group
    relation: str | None
    second: Group | None
    background: tuple[int, int, int]

    @property
    def facts(self) -> Facts:
        return Facts.of(self.first, self.relation, self.second)

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
                f"In the picture there {verb} {first}.",
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


def parse(caption: str) -> Facts | None:
    """What a caption says, in whatever case; None where it is no sentence that a scene would be described by."""
    words = _plain(caption)
    counts = {word: count for count, word in COUNTS.items()}
    groups = [
        Group(counts[count], size, colour, shape)
        for count, size, colour, shape in _PHRASE.findall(words)
    ]
    relations = [relation for relation in RELATIONS if f" {relation} " in words]
    if (len(groups), len(relations)) not in ((1, 0), (2, 1)):
        return None
    relation, second = (relations[0], groups[1]) if relations else (None, None)
    said = Scene(groups[0], relation, second, _BACKGROUNDS[0])
    return said.facts if words in map(_plain, said.captions()) else None


def make_scene(seed: int, split: str, index: int) -> Scene:
    """The scene of one index, to be described."""
    return _compose(seed, split, index)[0]


def draw_scene(seed: int, split: str, index: int) -> bytes:
    """The picture of one index, as PNG."""
    scene, choose = _compose(seed, split, index)
    return scene.draw(choose)


def _compose(seed: int, split: str, index: int) -> tuple[Scene, random.Random]:
    """The scene, and the generator that goes on to place its objects."""
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
    return Scene(first, relation, second, choose.choice(_BACKGROUNDS)), choose


def _plain(caption: str) -> str:
    return " ".join(caption.lower().removesuffix(".").split())


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
    canvas: ImageDraw.ImageDraw,
    shape: str,
    x: float,
    y: float,
    radius: float,
    fill: tuple[int, int, int],
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
