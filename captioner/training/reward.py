"""CIDEr-D of captions against their images' references, quickly and on token ids.

Vedantam et al., "CIDEr: Consensus-based Image Description Evaluation" (2015): the cosine of tf-idf weighted n-grams of
one to four words, with the clipping and the Gaussian penalty on length that make it CIDEr-D. The same number as
pycocoevalcap's, which counts document frequencies anew for every corpus; here they are a split's, counted once.
"""

import math
from collections import Counter
from collections.abc import Sequence

_ORDERS = 4
_SIGMA = 6.0

NGram = tuple[int, ...]


class Cider:
    """CIDEr-D (0 to 10) with the references of a whole split."""

    def __init__(self, references: Sequence[Sequence[Sequence[int]]]):
        """
        Args:
            references: token ids of the captions of every image, without ``<start>``. ``<end>`` may be in them and then
                counts as a word, which rewards captions for ending as people's do.
        """
        counted = [[_ngrams(caption) for caption in captions] for captions in references]
        frequency: Counter[NGram] = Counter()
        for captions in counted:
            frequency.update({ngram for caption in captions for ngram in caption})
        self._images = math.log(max(2, len(references)))
        self._idf = {ngram: self._images - math.log(count) for ngram, count in frequency.items()}
        self._references = [[self._vector(caption) for caption in captions] for captions in counted]

    def score(self, image: int, caption: Sequence[int]) -> float:
        """CIDEr-D of one caption of an image."""
        vectors, norms, length = self._vector(_ngrams(caption))
        total = 0.0
        for others, other_norms, other_length in self._references[image]:
            penalty = math.exp(-((length - other_length) ** 2) / (2 * _SIGMA**2))
            for order in range(_ORDERS):
                if norms[order] and other_norms[order]:
                    other = others[order]
                    common = sum(
                        min(weight, other[ngram]) * other[ngram]
                        for ngram, weight in vectors[order].items()
                        if ngram in other
                    )
                    total += penalty * common / (norms[order] * other_norms[order])
        return 10 * total / _ORDERS / len(self._references[image])

    def _vector(self, counts: Counter[NGram]) -> tuple[list[dict[NGram, float]], list[float], int]:
        vectors: list[dict[NGram, float]] = [{} for _ in range(_ORDERS)]
        length = 0
        for ngram, count in counts.items():
            # An n-gram that no reference has weighs as one that a single image has.
            vectors[len(ngram) - 1][ngram] = count * self._idf.get(ngram, self._images)
            if len(ngram) == 2:  # the reference implementation's length: the number of bigrams
                length += count
        norms = [math.sqrt(sum(weight**2 for weight in vector.values())) for vector in vectors]
        return vectors, norms, length


def _ngrams(caption: Sequence[int]) -> Counter[NGram]:
    counts: Counter[NGram] = Counter()
    for order in range(1, _ORDERS + 1):
        counts.update(
            tuple(caption[start : start + order]) for start in range(len(caption) - order + 1)
        )
    return counts
