"""How true captions of generated scenes are, by the scenes' grammar."""

import pytest

from captioner.evaluation.scenes import score_scenes

TRUE = "Two small red circles to the left of a large blue star."


@pytest.mark.parametrize(
    ("caption", "wrong"),
    [
        ("there are two small red circles to the left of a large blue star", set()),
        ("a large blue star is to the right of two small red circles", set()),
        ("two large red circles to the left of a large blue star", {"size"}),
        ("two small red circles to the right of a large blue star",
         {"colour", "shape", "number", "size", "right"}),
        ("two small red circles above a large blue star", {"relation", "right"}),
        ("two small red squares to the left of a large blue star", {"shape", "right"}),
        ("three small red circles to the left of a large blue star", {"number", "right"}),
        ("two small green circles to the left of a large blue star", {"colour", "right"}),
        ("two small blue circles to the left of a large red star", {"colour", "right"}),
        ("two small red circles in the picture",
         {"relation", "colour", "shape", "number", "size", "right"}),
        ("red circles", {"relation", "colour", "shape", "number", "size", "right"}),
    ],
)  # fmt: skip
def test_each_kind_of_fact_counts_alone(caption: str, wrong: set[str]) -> None:
    found = vars(score_scenes([caption, TRUE], [TRUE, TRUE]))
    kinds = ("right", "colour", "shape", "number", "size", "relation")
    assert found["scenes"] == 2
    assert {name for name in kinds if found[name] == 0.5} == wrong
    assert {name for name in kinds if found[name] == 1.0} == set(kinds) - wrong


def test_only_scenes_can_be_judged() -> None:
    with pytest.raises(ValueError, match="no caption of a scene: 'A dog runs.'"):
        score_scenes(["a dog"], ["A dog runs."])
