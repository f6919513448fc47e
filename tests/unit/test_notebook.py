"""The notebook's protocol for scores."""

from math import exp

import pytest

from captioner.notebook import score


def test_protocol_counts_both_tags_and_its_own_weights() -> None:
    references = [["A black dog runs .", "The dog , it runs ."]]
    # By hand: "startseq black dog runs endseq" against itself, and one word of it wrong.
    assert score(references, ["a black dog runs"], cleaned=False).model_dump() == {
        "bleu_1": 1.0,
        "bleu_2": 1.0,
        "bleu_3": 1.0,
        "bleu_4": 1.0,
    }
    scores = score(references, ["a black cat runs"], cleaned=False)
    # 4 of 5 words, 2 of 4 pairs, none of 3 triples.
    assert scores.bleu_1 == pytest.approx(4 / 5)
    assert scores.bleu_2 == pytest.approx((4 / 5 * 2 / 4) ** 0.5)
    assert scores.bleu_3 < 1e-3
    longer = score(references, ["black dog runs away"], cleaned=False)
    # 5 of 6 words, 3 of 5 pairs, 2 of 4 triples; the third set of weights sums to .9.
    assert longer.bleu_3 == pytest.approx((5 / 6 * 3 / 5 * 2 / 4) ** 0.3)


def test_protocol_leaves_words_of_its_own_rules_alone() -> None:
    references = [["man in white t-shirt"]]
    # 4 words of 6 with "t" and "shirt", as the notebook counted; 4 of 5 once the single letter is dropped,
    # which costs the brevity penalty of 5 words against 6.
    assert score(references, ["man in t shirt"], cleaned=True).bleu_1 == pytest.approx(4 / 6)
    assert score(references, ["man in t shirt"], cleaned=False).bleu_1 == pytest.approx(
        4 / 5 * exp(1 - 6 / 5)
    )


def test_protocol_survives_empty_captions() -> None:
    scores = score([["a black dog runs over the green grass in the park"]], [""], cleaned=False)
    # The tags alone still match: the inflation that the protocol is known for.
    assert 0 < scores.bleu_1 < 0.1
