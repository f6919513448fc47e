"""Which captions of generated scenes are true, by the scenes' own grammar: no n-grams are counted."""

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import pyarrow.parquet as pq

from captioner import storage
from captioner.evaluation.evaluate import PREDICTIONS
from captioner.sources.scenes import Facts, parse

TRUTH = "truth.json"


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


def write_truth(root: str) -> Truth:
    """Score the captions of the demo's report, below ``root`` (URI), and write that as JSON beside it.

    Raises:
        StoreError: the one cannot be read or the other not written.
        ValueError: the report is of other pictures.
    """
    data = storage.read_bytes(storage.join(root, "report", PREDICTIONS))
    found = pq.read_table(io.BytesIO(data), columns=["caption", "references"]).to_pydict()
    truth = score_scenes(found["caption"], [texts[0] for texts in found["references"]])
    storage.write_bytes(storage.join(root, TRUTH), json.dumps(asdict(truth), indent=1).encode())
    return truth


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
