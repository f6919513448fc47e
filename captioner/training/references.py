"""CIDEr-D against the references of a split, in arrays: 80 bytes a caption and 12 an n-gram, and no objects.

The same numbers as ``decoding.cider``, whose n-grams are those of one model's vocabulary and few; a split's are
millions. An n-gram is known by a hash of 64 bits.

Shapes: I images, S captions of each to be scored, R references, T tokens, K different n-grams.
"""

from typing import Any

import numpy as np

from captioner.text import PAD
from captioner.training.data import CaptionData
from captioner.training.plan import Indices

_ORDERS = 4
_SIGMA = 6.0
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
# Captions whose n-grams are listed at a time.
_CHUNK = 2**16

Hashes = np.ndarray[Any, np.dtype[np.uint64]]
Reals = np.ndarray[Any, np.dtype[np.float64]]


class References:
    """The captions of a split, ``<end>`` counted as a word, and how rare each n-gram of one to four words is."""

    def __init__(self, data: CaptionData):
        self._data = data
        self._by_image = np.argsort(data.image_rows, kind="stable")
        self._images, self._first = np.unique(data.image_rows[self._by_image], return_index=True)
        self._ends = np.append(self._first[1:], len(data))
        counted = [_document_frequencies(data, order) for order in range(1, _ORDERS + 1)]
        # One that no image has weighs as one that a single image has, so neither is kept.
        self._hashes = [hashes[count > 1] for hashes, count in counted]
        self._counts = [count[count > 1].astype(np.int32) for _, count in counted]

    def scores(self, images: Indices, captions: Indices) -> Reals:
        """CIDEr-D (0 to 10) of captions of images of the split: float64 [I, S].

        Args:
            images: int64 [I], rows of the split; of one below 0 the scores are 0.
            captions: int64 [I, S, T], without ``<start>``, ``<pad>`` after the words.
        """
        found = np.zeros(captions.shape[:2])
        for place, image in enumerate(images):
            if image >= 0:
                at = np.searchsorted(self._images, image)
                numbers = self._by_image[self._first[at] : self._ends[at]]
                longest = int(self._data.lengths[numbers].max())
                references = self._data.padded(numbers, longest).numpy()[:, 1:]
                found[place] = self._score(captions[place], references)
        return found

    def _score(self, captions: Indices, references: Indices) -> Reals:
        mine, theirs = _lengths(captions), _lengths(references)
        # Numbers of bigrams, as in the reference implementation.
        apart = np.subtract.outer(np.maximum(mine - 1, 0), np.maximum(theirs - 1, 0))
        total = np.zeros(apart.shape)
        for order in range(1, _ORDERS + 1):
            one, two = _ngrams(captions, mine, order), _ngrams(references, theirs, order)
            hashes, places = np.unique(np.concatenate([one[1], two[1]]), return_inverse=True)
            rarity = self._rarity(order, hashes)
            weights = []
            for rows, count, own in (
                (one[0], len(captions), places[: len(one[1])]),
                (two[0], len(references), places[len(one[1]) :]),
            ):
                occurrences = np.zeros((count, len(hashes)))
                np.add.at(occurrences, (rows, own), 1)
                weights.append(occurrences * rarity)
            left, right = weights
            common = (np.minimum(left[:, None], right[None]) * right[None]).sum(axis=2)
            norms = np.outer(np.linalg.norm(left, axis=1), np.linalg.norm(right, axis=1))
            total += np.divide(common, norms, out=np.zeros_like(common), where=norms > 0)
        score: Reals = 10 / _ORDERS * (total * np.exp(-(apart**2) / (2 * _SIGMA**2))).mean(axis=1)
        return score

    def _rarity(self, order: int, hashes: Hashes) -> Reals:
        """Inverse document frequencies, in nats."""
        known, counts = self._hashes[order - 1], self._counts[order - 1]
        frequency = np.ones(len(hashes))
        if len(known):
            at = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
            frequency = np.where(known[at] == hashes, counts[at], 1)
        rarity: Reals = np.log(max(2, len(self._images))) - np.log(frequency)
        return rarity


def _document_frequencies(data: CaptionData, order: int) -> tuple[Hashes, Indices]:
    """Different n-grams of a split, sorted, and how many images have each."""
    hashes, images = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    for start in range(0, len(data), _CHUNK):
        numbers = np.arange(start, min(start + _CHUNK, len(data)))
        longest = int(data.lengths[numbers].max())
        captions = data.padded(numbers, longest).numpy()[:, 1:]
        rows, found = _ngrams(captions, data.lengths[numbers] - 1, order)
        hashes.append(found)
        images.append(data.image_rows[numbers[rows]])
    all_hashes, all_images = np.concatenate(hashes), np.concatenate(images)
    by_hash = np.lexsort((all_images, all_hashes))
    all_hashes, all_images = all_hashes[by_hash], all_images[by_hash]
    # Once an image.
    first = np.ones(len(all_hashes), bool)
    first[1:] = (np.diff(all_hashes) != 0) | (np.diff(all_images) != 0)
    return np.unique(all_hashes[first], return_counts=True)


def _lengths(captions: Indices) -> Indices:
    lengths: Indices = (captions != PAD).sum(axis=1)
    return lengths


def _ngrams(captions: Indices, lengths: Indices, order: int) -> tuple[Indices, Hashes]:
    """The n-grams of captions [N, T]: each one's caption, and its hash."""
    count = captions.shape[1] - order + 1
    if count < 1:
        return np.empty(0, np.int64), np.empty(0, np.uint64)
    words = captions.astype(np.uint64) + np.uint64(1)
    hashes = np.zeros((len(captions), count), np.uint64)
    for place in range(order):
        hashes = (hashes ^ words[:, place : place + count]) * _FACTOR
        hashes ^= hashes >> np.uint64(29)
    rows, starts = np.nonzero(np.arange(count) < (lengths - order + 1)[:, None])
    return rows, hashes[rows, starts]
