"""Captions to words to token ids and back: one cleaning function and the vocabulary."""

import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import regex

from captioner import notebook
from captioner.errors import ModelError

Rules = Literal["standard", "notebook"]

PAD, START, END, UNK = 0, 1, 2, 3
SPECIAL = ("<pad>", "<start>", "<end>", "<unk>")
_VERSION = 1

# Vanish without separating: soft hyphens, marks of direction, and the variation selectors that follow emoji.
_DROPPED = dict.fromkeys(
    [
        0xAD,
        0x61C,
        0x200E,
        0x200F,
        0xFEFF,
        *range(0x202A, 0x202F),
        *range(0x2066, 0x206A),
        *range(0xFE00, 0xFE10),
    ]
) | dict.fromkeys(map(ord, "\u2019\u02bc"), "'")
# NFKC takes these vowels of Thai and Lao apart, for good.
_COMPOSED = {"\u0e4d\u0e32": "\u0e33", "\u0ecd\u0eb2": "\u0eb3"}
# Scripts written without spaces. Where Han or Kana meet other letters, there is no space either.
_CJK = r"\p{scx=Han}\p{scx=Hira}\p{scx=Kana}\p{scx=Bopo}\p{scx=Yiii}"
_UNSPACED = _CJK + r"\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Lana}\p{Tale}\p{Talu}\p{Tavt}\p{Java}"
# Joiners shape the letters of Persian, Sinhala or Malayalam words.
_RUN = regex.compile(r"[\p{L}\p{N}\p{Mn}\p{Mc}\u200c\u200d']+")
_UNSPACED_RUN = regex.compile(rf"[{_UNSPACED}][{_UNSPACED}\p{{M}}\u200c\u200d]*", regex.V1)
# Unicode's, and the vowels of Myanmar and Tai Tham that it lets stand alone.
_GRAPHEME = regex.compile(r"\X\p{M}*")
_TIBETAN, _TSHEG = regex.compile(r"\p{Tibetan}"), "\u0f0b"
_IS_UNSPACED = regex.compile(rf"[{_UNSPACED}]", regex.V1)
_IS_CJK = regex.compile(rf"[{_CJK}]", regex.V1)
_LATIN = regex.compile(r"\p{Latin}\p{M}*")
# What follows the apostrophe of an English contraction or genitive.
_CLITICS = frozenset(("s", "t", "d", "m", "n", "ll", "re", "ve"))


def clean(caption: str, rules: Rules = "standard") -> list[str]:
    """Words of a raw caption, which ``join`` writes as a text again.

    ``standard``: Unicode NFKC, lower case, letters (with their marks and joiners) and digits of every script kept; of
    scripts that are written without spaces (Han, Kana, Thai ...) each grapheme is a word. Apostrophes vanish from
    English contractions ("dog's" becomes "dogs"), and end a word of its own where vowels were elided ("l'", "homme");
    anything else separates words. ``notebook``: ``notebook.tokenize``.
    """
    if rules == "notebook":
        return notebook.tokenize(caption)
    text = unicodedata.normalize("NFKC", caption).translate(_DROPPED).lower()
    text = unicodedata.normalize("NFKC", text)
    for apart, composed in _COMPOSED.items():
        text = text.replace(apart, composed)
    found = []
    for run in _RUN.findall(text):
        if run.isascii() and "'" not in run:
            found.append(run)
            continue
        for part in _unelided(run):
            found += spaced(part).split()
    words = (word.strip("\u200c\u200d") for word in found)
    return [word for word in words if any(map(str.isalnum, word))]


def _unelided(run: str) -> list[str]:
    """A run of letters and apostrophes without those of English; what others end stands alone, with its apostrophe."""
    parts = [part for part in run.split("'") if part]
    done: list[str] = []
    current = parts[0] if parts else ""
    for part in parts[1:]:
        latin = _LATIN.match(part) and _LATIN.fullmatch(current[-1:])
        if part in _CLITICS or not (current[-1].isalpha() and part[0].isalpha()):
            current += part
        elif latin:
            done.append(f"{current}'")
            current = part
        else:  # a sign of its own in Ukrainian or Hebrew
            current += f"'{part}"
    return [*done, current]


def join(words: Iterable[str]) -> str:
    """Cleaned words as a text: with spaces, or what their script has instead, if anything."""
    text = last = ""
    for word in words:
        if not text or last.endswith("'"):
            space = ""
        elif _IS_CJK.match(word) or _IS_CJK.match(last):
            space = ""
        elif _TIBETAN.match(word) and _TIBETAN.match(last):
            space = _TSHEG
        else:
            space = "" if _IS_UNSPACED.match(word) and _IS_UNSPACED.match(last) else " "
        text += space + word
        last = word
    return text


def spaced(text: str) -> str:
    """A text with a space around each grapheme of scripts without spaces; any other text as it is."""
    if not _IS_UNSPACED.search(text):
        return text
    cut: str = _UNSPACED_RUN.sub(lambda run: f" {' '.join(_GRAPHEME.findall(run[0]))} ", text)
    return cut


@dataclass(frozen=True)
class Vocabulary:
    """Words and their token ids: ``<pad> <start> <end> <unk>`` are 0 to 3, then words by falling count.

    The notebook counts 7368 entries on Flickr8k: its words, the padding and both tags. Its rules give one more here,
    because it had no ``<unk>``.
    """

    words: tuple[str, ...]
    """All entries in the order of their ids."""
    rules: Rules = "standard"
    """Cleaning that the words came from, and that new captions must go through."""

    def __post_init__(self) -> None:
        if self.words[: len(SPECIAL)] != SPECIAL:
            raise ModelError(f"vocabulary: the first entries must be {' '.join(SPECIAL)}")
        if len(set(self.words)) != len(self.words):
            repeated = [word for word, count in Counter(self.words).items() if count > 1]
            raise ModelError(f"vocabulary: {repeated[0]!r} occurs twice")
        for word in self.words:
            if word.split() != [word]:
                raise ModelError(f"vocabulary: {word!r} is not one word")

    @classmethod
    def build(
        cls, captions: Iterable[Sequence[str]], min_count: int = 1, rules: Rules = "standard"
    ) -> "Vocabulary":
        """Vocabulary of cleaned captions, ties in count broken alphabetically.

        Args:
            captions: words of each caption.
            min_count: words seen fewer times are left out.
        """
        counts = Counter(word for words in captions for word in words)
        kept = [word for word, count in counts.items() if count >= min_count]
        kept.sort(key=lambda word: (-counts[word], word))
        return cls((*SPECIAL, *kept), rules)

    def __len__(self) -> int:
        return len(self.words)

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {word: position for position, word in enumerate(self.words)}

    def encode(self, words: Sequence[str], max_length: int | None = None) -> list[int]:
        """``<start> words <end>`` as ids; words past ``max_length`` tokens in all are cut, ``<end>`` stays.

        Unknown words are ``<unk>``. Under the notebook's rules they vanish, as in Keras' Tokenizer: it kept every train
        word, so nothing would ever teach ``<unk>``, and a few of them would rule the validation loss.
        """
        if self.rules == "notebook":
            words = [word for word in words if word in self._ids]
        if max_length is not None:
            words = words[: max(max_length - 2, 0)]
        return [START, *(self._ids.get(word, UNK) for word in words), END]

    def decode(self, ids: Iterable[int]) -> str:
        """Words up to the first ``<end>``, joined; other special tokens are left out."""
        words = []
        for one in ids:
            if one == END:
                break
            if one > UNK:
                words.append(self.words[one])
        return join(words) if self.rules == "standard" else " ".join(words)

    def save_json(self) -> str:
        """JSON text that ``from_json`` reads back to an equal vocabulary."""
        return json.dumps({"version": _VERSION, "rules": self.rules, "words": self.words}, indent=0)

    @classmethod
    def from_json(cls, text: str | bytes) -> "Vocabulary":
        """Read what ``save_json`` wrote.

        Raises:
            ModelError: it is not a vocabulary, or contradicts itself.
        """
        try:
            raw = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ModelError(f"vocabulary: not JSON: {error}") from error
        if not isinstance(raw, dict) or raw.get("version") != _VERSION:
            raise ModelError(f"vocabulary: expected version {_VERSION}")
        words, rules = raw.get("words"), raw.get("rules")
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise ModelError("vocabulary: words must be a list of strings")
        if rules not in ("standard", "notebook"):
            raise ModelError(f"vocabulary: unknown rules {rules!r}")
        return cls(tuple(words), rules)
