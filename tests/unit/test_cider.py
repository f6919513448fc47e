"""CIDEr-D on token ids is pycocoevalcap's, and the n-gram counts behind it come back from their file."""

import numpy as np
import pytest
import safetensors.torch
import torch
from pycocoevalcap.cider.cider import Cider

from captioner.decoding.cider import NGramFrequencies, cider_d
from captioner.errors import ModelError

Captions = list[list[int]]


@pytest.fixture(scope="module")
def split() -> tuple[list[Captions], Captions]:
    """Five references for each of 40 images, and a caption a little like the first of them."""
    generator = np.random.default_rng(0)

    def caption() -> list[int]:
        return generator.integers(4, 30, generator.integers(1, 12)).tolist()

    references = [[caption() for _ in range(5)] for _ in range(40)]
    return references, [captions[0][:4] + caption() for captions in references]


def test_it_is_pycocoevalcaps(split: tuple[list[Captions], Captions]) -> None:
    references, found = split
    as_text = {
        number: [" ".join(map(str, caption)) for caption in captions]
        for number, captions in enumerate(references)
    }
    _, expected = Cider().compute_score(
        as_text, {number: [" ".join(map(str, words))] for number, words in enumerate(found)}
    )
    frequencies = NGramFrequencies.count(references)
    got = [
        cider_d(frequencies.vector(words), [frequencies.vector(one) for one in captions])
        for words, captions in zip(found, references, strict=True)
    ]
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    assert cider_d(frequencies.vector([]), [frequencies.vector(references[3][0])]) == 0.0


def test_each_against_each_is_the_same_number(split: tuple[list[Captions], Captions]) -> None:
    references, found = split
    frequencies = NGramFrequencies.count(references)
    captions = [*found, [5, 6, 5, 6, 5, 6, 5], [5, 6, 5, 6], [5, 5, 5, 5, 5], [7], []]
    vectors = [frequencies.vector(words) for words in captions]
    expected = [[cider_d(one, [other]) for other in vectors] for one in vectors]
    np.testing.assert_allclose(frequencies.pairwise(captions), expected, rtol=1e-9, atol=1e-12)
    assert np.count_nonzero(expected) > 2 * len(captions)


def test_counts_are_of_images_and_only_shared_ngrams_are_kept() -> None:
    frequencies = NGramFrequencies.count([[[4, 5, 4, 5], [4]], [[4, 5]], [[6, 7]]])
    assert frequencies == NGramFrequencies(images=3, counts={(4,): 2, (5,): 2, (4, 5): 2})


def test_a_file_holds_them(split: tuple[list[Captions], Captions]) -> None:
    frequencies = NGramFrequencies.count(split[0])
    assert {len(ngram) for ngram in frequencies.counts} >= {1, 2}
    assert NGramFrequencies.unpack(frequencies.pack(), "file") == frequencies
    empty = NGramFrequencies(images=1, counts={})
    assert NGramFrequencies.unpack(empty.pack(), "file") == empty


def packed(ngrams: object, images: object, dtype: torch.dtype = torch.int32) -> bytes:
    return safetensors.torch.save(
        {"ngrams": torch.tensor(ngrams, dtype=dtype), "images": torch.tensor(images, dtype=dtype)}
    )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x80\x04pickle", "file is not a safetensors file"),
        (safetensors.torch.save({"weight": torch.ones(2)}), "file does not hold n-grams"),
        (packed([[4, 5, 6, 7]], [2, 3], torch.float32), "file does not hold n-grams"),
        (packed([[4, 5, 6]], [2, 3]), "file does not hold n-grams"),
        (packed([[4, 5, 6, 7]], [2, 2, 3]), "file does not hold n-grams"),
        (packed(4, 3), "file does not hold n-grams"),
        (packed([[4, -1, -1, -1]], [0, 3]), "counts are impossible"),
        (packed([[4, -1, -1, -1]], [4, 3]), "counts are impossible"),
    ],
)
def test_other_files_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        NGramFrequencies.unpack(data, "file")
