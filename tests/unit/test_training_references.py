"""CIDEr-D in arrays is that of the reference implementation's formula, whatever the captions."""

import numpy as np
import pytest

from captioner.decoding.cider import NGramFrequencies, cider_d
from captioner.text import END, PAD, START
from captioner.training.data import CaptionData
from captioner.training.references import References


def split(images: int, seed: int, *, most: int = 5, words: int = 9) -> CaptionData:
    """Captions of few words, so that n-grams repeat within and between them; one of them empty."""
    generator = np.random.default_rng(seed)
    rows = np.repeat(np.arange(images) * 2, generator.integers(1, most + 1, images))
    captions = [
        [START, *generator.integers(4, 4 + words, generator.integers(0, 9)).tolist(), END]
        for _ in rows
    ]
    return CaptionData(captions, rows)


@pytest.mark.parametrize("seed", range(5))
def test_scores_are_those_of_the_formula(seed: int) -> None:
    data = split(12, seed)
    references: dict[int, list[list[int]]] = {}
    for number, image in enumerate(data.image_rows.tolist()):
        references.setdefault(image, []).append(data.caption(number)[1:])
    frequencies = NGramFrequencies.count(references.values())
    generator = np.random.default_rng(seed + 100)
    # A word that no reference has; captions that have not ended; one that is a reference.
    drawn = [
        [
            [*generator.integers(4, 15, generator.integers(0, 7)).tolist(), END],
            generator.integers(4, 13, 8).tolist(),
            references[image][0],
        ]
        for image in references
    ]
    longest = max(len(caption) for captions in drawn for caption in captions)
    padded = np.full((len(drawn), 3, longest), PAD)
    for place, captions in enumerate(drawn):
        for number, caption in enumerate(captions):
            padded[place, number, : len(caption)] = caption
    found = References(data).scores(np.array(list(references)), padded)
    wanted = [
        [
            cider_d(
                frequencies.vector(caption), [frequencies.vector(one) for one in references[image]]
            )
            for caption in captions
        ]
        for image, captions in zip(references, drawn, strict=True)
    ]
    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-12)
    assert found.max() > 1


def test_a_worker_without_images_scores_nothing() -> None:
    data = split(3, 0)
    assert References(data).scores(np.array([-1]), np.array([[[5, END]]])).tolist() == [[0.0]]


def test_references_of_many_captions_take_little_memory() -> None:
    """No object a caption or n-gram: arrays of 12 bytes for an n-gram of two images at least."""
    data = split(2000, 0, words=500)
    references = References(data)
    held = sum(one.nbytes for one in (*references._hashes, *references._counts))
    assert held == 12 * sum(map(len, references._hashes)) > 0
