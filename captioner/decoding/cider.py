"""CIDEr-D of captions, quickly and on token ids.

Vedantam et al., "CIDEr: Consensus-based Image Description Evaluation" (2015): the cosine of tf-idf weighted n-grams of
one to four words, with the clipping and the Gaussian penalty on length that make it CIDEr-D. The same number as
pycocoevalcap's, which counts document frequencies anew for every corpus; here they are a split's, counted once.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch

from captioner.errors import ModelError

_ORDERS = 4
_SIGMA = 6.0

NGram = tuple[int, ...]


@dataclass(frozen=True)
class Vector:
    """A caption's weighted n-grams."""

    weights: tuple[dict[NGram, float], ...]
    """By number of words, one to four."""
    norms: tuple[float, ...]
    length: int
    """Number of bigrams, as in the reference implementation."""


@dataclass(frozen=True)
class NGramFrequencies:
    """How many images' captions an n-gram occurs in, for those that at least two images have."""

    images: int
    counts: dict[NGram, int]

    @classmethod
    def count(cls, references: Iterable[Iterable[Sequence[int]]]) -> "NGramFrequencies":
        """Those of a split.

        Args:
            references: token ids of the captions of every image, without ``<start>``. ``<end>`` may be in them and then
                counts as a word.
        """
        counts: Counter[NGram] = Counter()
        images = 0
        for captions in references:
            counts.update({ngram for caption in captions for ngram in _ngrams(caption)})
            images += 1
        # One that no image has weighs as one that a single image has, so neither is kept.
        return cls(images, {ngram: count for ngram, count in counts.items() if count > 1})

    def rarity(self, ngram: NGram) -> float:
        """Its inverse document frequency, in nats."""
        return math.log(max(2, self.images)) - math.log(self.counts.get(ngram, 1))

    def vector(self, caption: Sequence[int]) -> Vector:
        """A caption as the cosine sees it."""
        weights: tuple[dict[NGram, float], ...] = tuple({} for _ in range(_ORDERS))
        length = 0
        for ngram, count in _ngrams(caption).items():
            weights[len(ngram) - 1][ngram] = count * self.rarity(ngram)
            if len(ngram) == 2:
                length += count
        norms = tuple(math.sqrt(sum(value**2 for value in order.values())) for order in weights)
        return Vector(weights, norms, length)

    def pairwise(self, captions: Sequence[Sequence[int]]) -> np.ndarray[Any, np.dtype[np.float64]]:
        """``cider_d`` of each of N captions against each alone: float64 [N, N], a caption's own in its row."""
        counted = [_ngrams(caption) for caption in captions]
        bigrams = [
            sum(count for ngram, count in found.items() if len(ngram) == 2) for found in counted
        ]
        total = np.zeros((len(captions), len(captions)))
        for order in range(1, _ORDERS + 1):
            places: dict[NGram, int] = {}
            for found in counted:
                for ngram in found:
                    if len(ngram) == order:
                        places.setdefault(ngram, len(places))
            counts = np.zeros((len(captions), len(places)))
            for row, found in enumerate(counted):
                for ngram, count in found.items():
                    if len(ngram) == order:
                        counts[row, places[ngram]] = count
            rarity = np.array([self.rarity(ngram) for ngram in places])
            norms = np.sqrt(((counts * rarity) ** 2).sum(axis=1))
            # The smaller of two counts is how many of 1, 2, ... both of them reach.
            common = np.zeros_like(total)
            for level in range(1, int(counts.max(initial=0)) + 1):
                reached = counts >= level
                # By torch, whose number of threads the callers set.
                mine = torch.from_numpy(reached * rarity)
                common += (mine @ torch.from_numpy(reached * counts * rarity).T).numpy()
            product = np.outer(norms, norms)
            total += np.divide(common, product, out=np.zeros_like(total), where=product > 0)
        difference = np.subtract.outer(bigrams, bigrams)
        return 10 / _ORDERS * total * np.exp(-(difference**2) / (2 * _SIGMA**2))

    def pack(self) -> bytes:
        """As safetensors: ``ngrams`` int32 [N, 4], -1 after the last word; ``images`` int32 [N + 1], those that have
        each, and last the number of all images.
        """
        rows = sorted(self.counts)
        ngrams = torch.tensor([[*row, *[-1] * (_ORDERS - len(row))] for row in rows])
        images = torch.tensor([*(self.counts[row] for row in rows), self.images])
        return safetensors.torch.save(
            {"ngrams": ngrams.reshape(-1, _ORDERS).int(), "images": images.int()}
        )

    @classmethod
    def unpack(cls, data: bytes, name: str) -> "NGramFrequencies":
        """What ``pack`` made.

        Raises:
            ModelError: it is something else; ``name`` is in the message.
        """
        try:
            found = safetensors.torch.load(data)
        except (
            safetensors.SafetensorError,
            KeyError,
        ) as error:  # KeyError: a dtype unknown to torch
            raise ModelError(f"{name} is not a safetensors file: {error}") from error
        layout = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in found.items()}
        rows = found["images"].numel() - 1 if "images" in found else 0
        wanted = {"ngrams": (torch.int32, (rows, _ORDERS)), "images": (torch.int32, (rows + 1,))}
        if layout != wanted:
            raise ModelError(f"{name} does not hold n-grams of a split but {layout}")
        *counts, images = found["images"].tolist()
        if images < 1 or not all(2 <= count <= images for count in counts):
            raise ModelError(f"{name} does not hold n-grams of a split: its counts are impossible")
        ngrams = (tuple(word for word in row if word >= 0) for row in found["ngrams"].tolist())
        return cls(images, dict(zip(ngrams, counts, strict=True)))


def cider_d(caption: Vector, references: Sequence[Vector]) -> float:
    """CIDEr-D (0 to 10) of a caption against its references."""
    total = 0.0
    for other in references:
        penalty = math.exp(-((caption.length - other.length) ** 2) / (2 * _SIGMA**2))
        for order in range(_ORDERS):
            if caption.norms[order] and other.norms[order]:
                theirs = other.weights[order]
                common = sum(
                    min(weight, theirs[ngram]) * theirs[ngram]
                    for ngram, weight in caption.weights[order].items()
                    if ngram in theirs
                )
                total += penalty * common / (caption.norms[order] * other.norms[order])
    return 10 * total / _ORDERS / len(references)


def _ngrams(caption: Sequence[int]) -> Counter[NGram]:
    counts: Counter[NGram] = Counter()
    for order in range(1, _ORDERS + 1):
        counts.update(
            tuple(caption[start : start + order]) for start in range(len(caption) - order + 1)
        )
    return counts
