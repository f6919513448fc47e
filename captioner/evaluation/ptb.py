"""Stanford's PTB tokens, by its tokenizer in Java or, without one, by its equal on caption text."""

import functools
import logging
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import regex
from pycocoevalcap.tokenizer import ptbtokenizer

from captioner.errors import ConfigError
from captioner.text import spaced

logger = logging.getLogger(__name__)

Tokenizer = Literal["stanford", "built-in", "stanford, graphemes", "built-in, graphemes"]
"""stanford: PTBTokenizer 3.4.1 in Java. built-in: ``ptb_tokens``. graphemes: what is written without spaces (Han, Kana,
Thai ...) was cut into its graphemes first, as neither knows its words."""


# Full stops, commas and brackets of other scripts, which count as little as English ones.
_FOREIGN_MARKS = regex.compile(
    r"[[\p{Terminal_Punctuation}\p{Ps}\p{Pe}]--[\x00-\x7f\u2018-\u201f]]", regex.V1
)


def has_java() -> bool:
    """Whether METEOR and Stanford's tokenizer can run."""
    return shutil.which("java") is not None


def tokenize(texts: Iterable[str]) -> tuple[dict[str, str], Tokenizer]:
    """Lower-cased tokens without punctuation of each text, joined by spaces, and which tokenizer made them.

    Raises:
        ConfigError: there is a Java, and it failed.
    """
    # A line each.
    lines = {text: " ".join(_FOREIGN_MARKS.sub(" ", spaced(text)).split()) for text in texts}
    ordered = sorted({*lines.values()} - {""})
    java = shutil.which("java")
    if java is None:
        logger.warning(
            "no Java: captions are tokenized by the built-in equal of Stanford's PTBTokenizer"
        )
    tokens = {"": ""} | dict(
        zip(ordered, _stanford(java, ordered) if java else map(ptb_tokens, ordered), strict=True)
    )
    name: Tokenizer = "stanford" if java else "built-in"
    if any(spaced(text) != text for text in lines):
        name = "stanford, graphemes" if java else "built-in, graphemes"
    return {text: tokens[line] for text, line in lines.items()}, name


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
def _scanner() -> tuple[regex.Pattern[str], regex.Pattern[str]]:
    clitic = r"'(?:s|m|d|ll|re|ve)(?!\w)"
    split = regex.compile(
        rf"(?<=\w)(?=n't(?!\w)|{clitic})|(?<=\bcan)(?=not\b)|(?<=\bgon|\bwan)(?=na\b)|(?<=\bgot)(?=ta\b)"
        r"|(?<=\blem|\bgim)(?=me\b)|(?<!\w't)(?<='t)(?=is\b|was\b)"
    )
    token = regex.compile(
        rf"""<\w+>                              # <unk>
        | n't(?!\w) | {clitic} | '\d\ds\b | 't(?=\ ) | 'n'
        | @\w+
        | (?:\w\.)+(?!\w)                       # u.s.  p.
        | (?:{_ABBREVIATIONS})\.(?!\w)
        | \w&\w\b
        | -?\d+(?:[.,:]\d+)+
        | (?<!\S)-\d+
        | \w+(?:(?:[-/.]|'(?!(?:s|m|d|ll|re|ve|t)(?!\w)))\w+)*
        | [?!]+ | \.\.\. | --+ | `` | ''
        | [^\s\p{{M}}\p{{Cf}}\U00010000-\U0010ffff]  # Stanford's keeps no emoji but the oldest""",
        regex.VERBOSE,
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
