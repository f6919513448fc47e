"""Corpus scores of captions against references: the standard protocol, and the notebook's own beside it.

``standard`` is what publications on COCO and Flickr8k report: raw references and hypotheses, PTB tokens without
punctuation, then BLEU, ROUGE-L and CIDEr-D (and METEOR) as pycocoevalcap computes them. ``seed`` is the notebook's
protocol, whose tags in every caption inflate each figure; it only serves to compare with the notebook.
"""

import functools
import logging
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer import ptbtokenizer
from pydantic import BaseModel, ConfigDict

from captioner.errors import ConfigError

logger = logging.getLogger(__name__)


class _Scores(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class StandardScores(_Scores):
    """Scores under the standard protocol: BLEU, ROUGE-L and METEOR as fractions of 1, CIDEr-D up to 10."""

    bleu_1: float
    bleu_2: float
    bleu_3: float
    bleu_4: float
    rouge_l: float
    cider: float
    meteor: float | None = None
    """None where it was not asked for."""
    tokenizer: Literal["stanford", "built-in"]
    """stanford: PTBTokenizer 3.4.1 in Java. built-in: its equal on caption text, where there is no Java."""
    per_image: dict[str, list[float]]
    """Scores of each image alone, in the order given: bleu_4, rouge_l, cider."""

    def summary(self) -> dict[str, float | str]:
        """The corpus scores and the tokenizer, without METEOR where there is none."""
        return self.model_dump(exclude={"per_image"}, exclude_none=True)


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
    texts = [" ".join(text.split()) for texts in (*references, hypotheses) for text in texts]
    tokens, tokenizer = _tokenize({text for text in texts if text})
    tokens[""] = ""

    def tokenized(text: str) -> str:
        return tokens[" ".join(text.split())]

    truth = {row: [tokenized(text) for text in group] for row, group in enumerate(references)}
    found = {row: [tokenized(text)] for row, text in enumerate(hypotheses)}
    if not any(text for group in truth.values() for text in group):
        raise ValueError("references: there is not one word in them")
    bleu, bleu_per_image = Bleu(4).compute_score(truth, found, verbose=0)
    rouge_l, rouge_per_image = Rouge().compute_score(truth, found)
    cider, cider_per_image = Cider().compute_score(truth, found)
    return StandardScores(
        bleu_1=bleu[0],
        bleu_2=bleu[1],
        bleu_3=bleu[2],
        bleu_4=bleu[3],
        rouge_l=float(rouge_l),
        cider=float(cider),
        meteor=Meteor().compute_score(truth, found)[0] if meteor else None,
        tokenizer=tokenizer,
        per_image={
            "bleu_4": bleu_per_image[3],
            "rouge_l": np.asarray(rouge_per_image, float).tolist(),
            "cider": np.asarray(cider_per_image, float).tolist(),
        },
    )


def has_java() -> bool:
    """Whether METEOR and Stanford's tokenizer can run."""
    return shutil.which("java") is not None


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


def _tokenize(texts: set[str]) -> tuple[dict[str, str], Literal["stanford", "built-in"]]:
    """PTB tokens of each text, joined by spaces, and which tokenizer made them."""
    ordered = sorted(texts)
    java = shutil.which("java")
    if java is not None:
        return dict(zip(ordered, _stanford(java, ordered), strict=True)), "stanford"
    logger.warning(
        "no Java: captions are tokenized by the built-in equal of Stanford's PTBTokenizer"
    )
    return {text: ptb_tokens(text) for text in ordered}, "built-in"


def _stanford(java: str, texts: list[str]) -> list[str]:
    """As ``pycocoevalcap.tokenizer`` runs it, without the temporary file that it puts among the packages."""
    folder = Path(ptbtokenizer.__file__).parent
    done = subprocess.run(
        [
            java,
            "-cp",
            ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR,
            "edu.stanford.nlp.process.PTBTokenizer",
        ]
        + ["-preserveLines", "-lowerCase", "-encoding", "UTF-8"],
        cwd=folder,
        input="\n".join(texts).encode(),
        capture_output=True,
        check=False,
    )
    lines = done.stdout.decode().split("\n")
    if done.returncode or len(lines) < len(texts):
        raise ConfigError(
            f"PTBTokenizer failed: {done.stderr.decode(errors='replace').strip()[-300:]}"
        )
    return [_without_punctuation(line.split()) for line in lines[: len(texts)]]


def _without_punctuation(tokens: Sequence[str]) -> str:
    # The list has brackets in capitals, which lower-cased tokens never match: "-lrb-" stays, in all published scores.
    return " ".join(token for token in tokens if token not in ptbtokenizer.PUNCTUATIONS)


_SPELLINGS = {
    "\u2019": "'", "\u2018": "`", "\u201c": "``", "\u201d": "''", "\u2013": "--", "\u2014": "--", "\u2026": "...",
}  # fmt: skip
_BRACKETS = {
    "(": "-lrb-",
    ")": "-rrb-",
    "[": "-lsb-",
    "]": "-rsb-",
    "{": "-lcb-",
    "}": "-rcb-",
    '"': "''",
}
_ABBREVIATIONS = (
    "mr|mrs|ms|dr|st|jr|sr|vs|etc|prof|gen|rev|lt|col|sgt|capt|ave|blvd|rd|mt|ft|co|corp|inc|ltd"
)


@functools.cache
def _scanner() -> tuple[re.Pattern[str], re.Pattern[str]]:
    clitic = r"'(?:s|m|d|ll|re|ve)(?!\w)"
    split = re.compile(
        rf"(?<=\w)(?=n't(?!\w)|{clitic})|(?<=\bcan)(?=not\b)|(?<=\bgon|\bwan)(?=na\b)|(?<=\bgot)(?=ta\b)"
        r"|(?<=\blem|\bgim)(?=me\b)|(?<!\w't)(?<='t)(?=is\b|was\b)"
    )
    token = re.compile(
        rf"""<\w+>                              # <unk>
        | n't(?!\w) | {clitic} | '\d\ds\b | 't(?=\ ) | 'n'
        | @\w+
        | (?:\w\.)+(?!\w)                       # u.s.  p.
        | (?:{_ABBREVIATIONS})\.(?!\w)
        | \w&\w\b
        | -?\d+(?:[.,:]\d+)+
        | (?<!\S)-\d+
        | \w+(?:(?:[-/.]|'(?!(?:s|m|d|ll|re|ve|t)(?!\w)))\w+)*
        | [?!]+ | \.\.\. | --+ | `` | '' | \S""",
        re.VERBOSE,
    )
    return split, token


def ptb_tokens(text: str) -> str:
    """Stanford's lower-cased PTB tokens without punctuation, joined by spaces, for text as found in captions.

    Equal to the Java tokenizer on all captions of Flickr8k; rarer things (web addresses, other abbreviations,
    fractions in one character) may differ.
    """
    split, token = _scanner()
    for written, plain in _SPELLINGS.items():
        text = text.replace(written, plain)
    text = split.sub(" ", text.lower())
    return _without_punctuation([_BRACKETS.get(found, found) for found in token.findall(text)])
