"""Captions to words to token ids and back: one cleaning function and the vocabulary."""

import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from captioner import notebook
from captioner.errors import ModelError

Rules = Literal["standard", "notebook"]

PAD, START, END, UNK = 0, 1, 2, 3
SPECIAL = ("<pad>", "<start>", "<end>", "<unk>")
_VERSION = 1

# Vanish without separating: apostrophes, and the variation selectors that follow emoji.
_DROPPED = dict.fromkeys([*map(ord, "'\u2019\u02bc"), *range(0xFE00, 0xFE10)])


def clean(caption: str, rules: Rules = "standard") -> list[str]:
    """Words of a raw caption.

    ``standard``: Unicode NFKC, lower case, letters (with their combining marks) and digits kept; apostrophes vanish
    ("dog's" becomes "dogs"), anything else separates words. ``notebook``: ``notebook.tokenize``.
    """
    if rules == "notebook":
        return notebook.tokenize(caption)
    text = unicodedata.normalize("NFKC", caption).translate(_DROPPED).lower()
    text = unicodedata.normalize("NFKC", text)
    kept = "".join(character if _belongs_to_word(character) else " " for character in text)
    return [word for word in kept.split() if any(map(str.isalnum, word))]


def _belongs_to_word(character: str) -> bool:
    return character.isalnum() or unicodedata.category(character) in ("Mn", "Mc")


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
        """Words up to the first ``<end>``, joined by spaces; other special tokens are left out."""
        words = []
        for one in ids:
            if one == END:
                break
            if one > UNK:
                words.append(self.words[one])
        return " ".join(words)

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
