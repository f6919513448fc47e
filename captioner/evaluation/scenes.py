"""Which captions of generated scenes are true, by the scenes' own grammar: no n-grams are counted."""

from collections.abc import Sequence
from dataclasses import dataclass

from captioner.sources.scenes import Facts, parse


@dataclass(frozen=True)
class Truth:
    """Fractions of scenes; of each kind all groups must be right."""

    scenes: int
    right: float
    """Colour, shape, number and relation of every group, by a caption that is a sentence of the grammar."""
    colour: float
    shape: float
    number: float
    size: float
    relation: float

    def __str__(self) -> str:
        kinds = ", ".join(
            f"{name} {getattr(self, name):.3f}"
            for name in ("colour", "shape", "number", "relation", "size")
        )
        return (
            f"colour, shape, number and relation of every group are right in {self.right:.3f} of "
            f"{self.scenes} scenes ({kinds})"
        )


def score_scenes(captions: Sequence[str], references: Sequence[str]) -> Truth:
    """Compare captions with what is true of their scenes.

    Args:
        references: a caption of each scene that is right.

    Raises:
        ValueError: a reference is no sentence of the grammar.
    """
    pairs = []
    for caption, reference in zip(captions, references, strict=True):
        true = parse(reference)
        if true is None:
            raise ValueError(f"no caption of a scene: {reference!r}")
        pairs.append((parse(caption), true))

    def share(*kinds: str) -> float:
        return sum(said is not None and _alike(said, true, kinds) for said, true in pairs) / max(
            len(pairs), 1
        )

    return Truth(
        scenes=len(pairs),
        right=share("colour", "shape", "count", "relation"),
        colour=share("colour"),
        shape=share("shape"),
        number=share("count"),
        size=share("size"),
        relation=share("relation"),
    )


def _alike(said: Facts, true: Facts, kinds: Sequence[str]) -> bool:
    """Whether two descriptions agree in the kinds, their groups in order."""
    groups = [kind for kind in kinds if kind != "relation"]

    def of(facts: Facts) -> list[tuple[object, ...]]:
        return [tuple(getattr(group, kind) for kind in groups) for group in facts.groups]

    return of(said) == of(true) and ("relation" not in kinds or said.relation == true.relation)
