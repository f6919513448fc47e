"""Of the captions a beam search finds, those first that agree with what the decoder says when it talks freely.

Minimum Bayes risk, Kumar and Byrne, "Minimum Bayes-Risk Decoding for Statistical Machine Translation" (2004), with
CIDEr-D for gain: captions drawn at random stand for those people might write. The mean over so few of them is a rough
one, so the search's own score is added to it, which decides between captions that agree with them equally well.
"""

import torch

from captioner.cider import NGramFrequencies, Vector, cider_d
from captioner.config import DecodeConfig
from captioner.models.base import Decoder, Features
from captioner.models.ensemble import members_of
from captioner.models.sampling import sample
from captioner.models.search import Hypothesis, search
from captioner.text import END, PAD

# Drawn colder than the decoder's own distribution, whose rare words are mostly slips.
_TEMPERATURE = 0.8
# Captions drawn at once, so that memory does not grow with the number of images.
_ROWS = 1024


@torch.inference_mode()
def search_by_consensus(
    decoder: Decoder, features: Features, config: DecodeConfig, frequencies: NGramFrequencies
) -> list[list[Hypothesis]]:
    """The ``num_captions`` best of a search's ``beam_size`` captions of every image, best first.

    They are ranked by their score, which ``length_penalty`` shapes, plus their mean CIDEr-D against
    ``config.consensus`` captions, of which each member of an ensemble draws its share, rounded up. All images are given
    the same random numbers, so that an image's caption depends neither on its batch nor on what was captioned before.

    Args:
        decoder: in evaluation mode.
        features: columns of B images, float32, on the decoder's device.
        frequencies: of the captions the decoder was trained on.
    """
    every = config.model_copy(update={"num_captions": config.beam_size})
    found = search(decoder, features, every)
    drawn = _draw(decoder, features, config)
    return [
        _ranked(hypotheses, captions, frequencies)[: config.num_captions]
        for hypotheses, captions in zip(found, drawn, strict=True)
    ]


def _ranked(
    hypotheses: list[Hypothesis], captions: list[list[int]], frequencies: NGramFrequencies
) -> list[Hypothesis]:
    others = [frequencies.vector(caption) for caption in captions]
    return sorted(
        hypotheses,
        key=lambda one: one.score + agreement(one, others, frequencies),
        reverse=True,
    )


def agreement(one: Hypothesis, others: list[Vector], frequencies: NGramFrequencies) -> float:
    """Mean CIDEr-D (0 to 10) of a hypothesis, its ``<end>`` included, against captions that end in theirs."""
    return cider_d(frequencies.vector((*one.tokens, END)), others)


def _draw(decoder: Decoder, features: Features, config: DecodeConfig) -> list[list[list[int]]]:
    """Token ids of captions drawn for every image, without ``<start>``."""
    images = len(next(iter(features.values())))
    members = members_of(decoder)
    each = -(-config.consensus // len(members))
    piece = max(1, _ROWS // each)
    drawn: list[list[list[int]]] = [[] for _ in range(images)]
    for start in range(0, images, piece):
        some = {name: tensor[start : start + piece] for name, tensor in features.items()}
        for seed, member in enumerate(members):
            noise = torch.Generator().manual_seed(seed)
            tokens, _ = sample(
                member, some, each, config.max_length, temperature=_TEMPERATURE, noise=noise
            )
            for row, caption in enumerate(tokens[:, 1:].tolist()):
                drawn[start + row // each].append([word for word in caption if word != PAD])
    return drawn
