"""What a caption must begin with and must not contain."""

from dataclasses import dataclass

from captioner.config import DecodeConfig
from captioner.errors import ConfigError
from captioner.text import UNK, Vocabulary, clean


@dataclass(frozen=True)
class Constraint:
    """Token ids. A forced word goes before all that would forbid it."""

    prefix: tuple[int, ...] = ()
    forbidden: tuple[int, ...] = ()

    @classmethod
    def of(cls, decode: DecodeConfig, vocabulary: Vocabulary) -> "Constraint":
        """Of a search's ``prefix`` and ``forbid``; forbidden words that are unknown are never written anyway.

        Raises:
            ConfigError: a word of the prefix is unknown or there is none in it, it is longer than a caption, or what is
                forbidden is no word.
        """
        words = clean(decode.prefix, vocabulary.rules)
        if decode.prefix.strip() and not words:
            raise ConfigError(f"prefix: {decode.prefix.strip()!r:.40} has no word in it")
        if len(words) > decode.max_length:
            raise ConfigError(f"prefix: {len(words)} words, over max_length {decode.max_length}")
        prefix = [_id(word, vocabulary) for word in words]
        if UNK in prefix:
            unknown = words[prefix.index(UNK)]
            raise ConfigError(f"prefix: {unknown!r:.40} is no word that the model knows")
        forbidden = []
        for text in filter(str.strip, decode.forbid.split(",")):
            found = clean(text, vocabulary.rules)
            if len(found) != 1:
                raise ConfigError(
                    f"forbid: {text.strip()!r:.40} is not one word; commas separate them"
                )
            forbidden += [one for one in (_id(found[0], vocabulary),) if one != UNK]
        return cls(tuple(prefix), tuple(sorted(set(forbidden))))

    def forced(self, place: int) -> int | None:
        """The word that a caption has at a place, where it must be one."""
        return self.prefix[place] if place < len(self.prefix) else None


FREE = Constraint()


def _id(word: str, vocabulary: Vocabulary) -> int:
    ids = vocabulary.encode([word])[1:-1]
    return ids[0] if ids else UNK
