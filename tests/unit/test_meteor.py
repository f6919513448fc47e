"""METEOR in its own Java process, which takes some ten seconds to load its paraphrases."""

import shutil

import pytest

from captioner.evaluation.scores import score_standard
from tests.unit.test_scores import NLG_EVAL_HYPOTHESES, NLG_EVAL_REFERENCES

pytestmark = pytest.mark.skipif(shutil.which("java") is None, reason="needs Java")

# Expected by nlgeval/tests/test_nlgeval.py of github.com/Maluuba/nlg-eval.
NLG_EVAL_METEOR = 0.295797


def test_published_meteor_is_reproduced() -> None:
    scores = score_standard(NLG_EVAL_REFERENCES, NLG_EVAL_HYPOTHESES, meteor=True)
    assert scores.corpus["meteor"] == pytest.approx(NLG_EVAL_METEOR, abs=1e-6)
    assert len(scores.per_image["meteor"]) == len(NLG_EVAL_HYPOTHESES)


def test_meteor_survives_an_empty_caption() -> None:
    scores = score_standard(NLG_EVAL_REFERENCES, ["", NLG_EVAL_HYPOTHESES[1]], meteor=True)
    assert 0 < scores.corpus["meteor"] < NLG_EVAL_METEOR
