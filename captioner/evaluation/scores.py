"""Corpus scores of captions against references under the standard protocol, and how varied and long captions are.

The protocol is what publications on COCO and Flickr8k report: raw references and hypotheses, PTB tokens without
punctuation, then BLEU, ROUGE-L and CIDEr-D (and METEOR) as pycocoevalcap computes them.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pydantic import BaseModel, ConfigDict

from captioner.errors import ConfigError
from captioner.evaluation.ptb import Tokenizer, has_java, tokenize
from captioner.text import clean

Tokens = Mapping[int, list[str]]
"""Captions of each image, by its row; tokens are joined by spaces. A hypothesis is the only one of its image."""
Score = tuple[float, Sequence[float]]
"""Of the corpus, and of each image alone."""
Metric = Callable[[Tokens, Tokens], Mapping[str, Score]]
"""References and hypotheses -> scores by name."""


def _bleu(references: Tokens, hypotheses: Tokens) -> Mapping[str, Score]:
    corpus, images = Bleu(4).compute_score(references, hypotheses, verbose=0)
    return {f"bleu_{size}": score for size, score in enumerate(zip(corpus, images, strict=True), 1)}


def _rouge_l(references: Tokens, hypotheses: Tokens) -> Mapping[str, Score]:
    return {"rouge_l": Rouge().compute_score(references, hypotheses)}


def _cider(references: Tokens, hypotheses: Tokens) -> Mapping[str, Score]:
    return {"cider": Cider().compute_score(references, hypotheses)}


def _meteor(references: Tokens, hypotheses: Tokens) -> Mapping[str, Score]:
    return {"meteor": Meteor().compute_score(references, hypotheses)}


METRICS: tuple[Metric, ...] = (_bleu, _rouge_l, _cider)
"""What is always computed; everything else about a metric follows from its names."""


class StandardScores(BaseModel):
    """Scores under the standard protocol: BLEU, ROUGE-L and METEOR as fractions of 1, CIDEr-D up to 10."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    corpus: dict[str, float]
    """By name: bleu_1 to bleu_4, rouge_l, cider, and meteor where it was asked for."""
    per_image: dict[str, list[float]]
    """The same of each image alone, in the order given."""
    tokenizer: Tokenizer


def score_standard(
    references: Sequence[Sequence[str]], hypotheses: Sequence[str], *, meteor: bool = False
) -> StandardScores:
    """Score one caption per image against that image's references.

    Args:
        references: raw captions of each image, at least one; cleaning them would change the scores.
        hypotheses: the caption of each image; may be empty.
        meteor: also compute METEOR, which takes Java and its 2 GiB.

    Raises:
        ConfigError: METEOR is asked for and there is no Java.
        ValueError: no images, an image without references, or lengths that differ.
    """
    _check(references, hypotheses)
    if meteor and not has_java():
        raise ConfigError("meteor: needs Java, and there is no java on the path")
    tokens, tokenizer = tokenize(text for texts in (*references, hypotheses) for text in texts)
    truth = {row: [tokens[text] for text in texts] for row, texts in enumerate(references)}
    found = {row: [tokens[text]] for row, text in enumerate(hypotheses)}
    if not any(text for texts in truth.values() for text in texts):
        raise ValueError("references: there is not one word in them")
    scores: dict[str, Score] = {}
    for metric in (*METRICS, _meteor) if meteor else METRICS:
        scores.update(metric(truth, found))
    return StandardScores(
        corpus={name: float(corpus) for name, (corpus, _) in scores.items()},
        per_image={
            name: np.asarray(images, float).tolist() for name, (_, images) in scores.items()
        },
        tokenizer=tokenizer,
    )


def _check(references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> None:
    if len(references) != len(hypotheses):
        raise ValueError(
            f"{len(hypotheses)} hypotheses for the references of {len(references)} images"
        )
    if not hypotheses:
        raise ValueError("no captions to score")
    for row, texts in enumerate(references):
        if isinstance(texts, str) or not texts:
            raise ValueError(
                f"references: a list of at least one caption is needed, row {row} has {texts!r}"
            )


def caption_statistics(texts: Sequence[str]) -> dict[str, Any]:
    """How varied and how long captions are: counts, and lengths in cleaned words."""
    words = [clean(text) for text in texts]
    lengths = Counter(map(len, words))
    return {
        "captions": len(texts),
        "distinct_captions": len({" ".join(caption) for caption in words}),
        "vocabulary": len({word for caption in words for word in caption}),
        "mean_length": sum(map(len, words)) / len(words),
        "longest": max(lengths),
        "lengths": {str(length): lengths[length] for length in sorted(lengths)},
    }
