"""Minimum-Bayes-risk decoding: captions ranked by their expected utility, estimated from samples, and by their score.

Kumar and Byrne, "Minimum Bayes-Risk Decoding for Statistical Machine Translation" (2004), with candidates from beam
search and from the samples themselves, as in Eikema and Aziz, "Sampling-Based Approximations to Minimum Bayes Risk
Decoding" (2022). The utility of a caption given a reference is the square root of CIDEr-D: the mean of CIDEr-D itself
would be the work of a few near repetitions. Over so few samples the mean is a rough one, so the score is added to it.

Shapes: B images.
"""

import numpy as np
import torch
from torch import Tensor

from captioner.config import DecodeConfig
from captioner.decoders.base import Decoder, Features, start_captions
from captioner.decoders.ensemble import members_of
from captioner.decoding.beam import Hypothesis, normalized, search
from captioner.decoding.cider import NGramFrequencies
from captioner.decoding.constraint import FREE, Constraint
from captioner.decoding.sampling import sample
from captioner.text import END, PAD, START

# Captions sampled at once, so that memory does not grow with the number of images.
_ROWS = 1024

Caption = tuple[int, ...]
"""Token ids, without ``<start>``; ``<end>`` last where the caption is finished."""


@torch.inference_mode()
def search_mbr(
    decoder: Decoder,
    features: Features,
    config: DecodeConfig,
    frequencies: NGramFrequencies,
    constraint: Constraint = FREE,
) -> list[list[Hypothesis]]:
    """The ``num_captions`` best captions of every image, best first.

    Candidates are the ``beam_size`` captions of a beam search, and of ``mbr_samples`` samples the ``mbr_candidates`` of
    highest expected utility. They are ranked by score, which ``length_penalty`` shapes, plus ``mbr_weight`` times
    expected utility. Each member of an ensemble draws its share of the samples, rounded up. All images share the random
    numbers, so that a caption depends neither on its batch nor on what was captioned before.

    Args:
        decoder: in evaluation mode.
        features: columns of B images, float32, on the decoder's device.
        frequencies: of the captions the decoder was trained on.
        constraint: that of ``config``.
    """
    every = config.model_copy(update={"num_captions": config.beam_size})
    beams = search(decoder, features, every, constraint)
    samples = _draw(decoder, features, config, constraint)
    utilities = [
        expected_utilities([_finished(one) for one in found], drawn, frequencies)
        for found, drawn in zip(beams, samples, strict=True)
    ]
    chosen = [
        _candidates(utility, {_finished(one) for one in found}, config)
        for utility, found in zip(utilities, beams, strict=True)
    ]
    scored = _score(decoder, features, chosen, config)
    return [
        _rank([*found, *others], utility, config)
        for found, others, utility in zip(beams, scored, utilities, strict=True)
    ]


def expected_utilities(
    beams: list[Caption], samples: list[Caption], frequencies: NGramFrequencies
) -> dict[Caption, float]:
    """Mean square root of CIDEr-D (0 to 10) of captions of one image against its samples, the caption itself left out
    once.

    Returns:
        that of every beam and every sample.
    """
    places = {caption: place for place, caption in enumerate(dict.fromkeys([*beams, *samples]))}
    times = np.zeros(len(places))
    for caption in samples:
        times[places[caption]] += 1
    pairs = np.sqrt(frequencies.pairwise(list(places)))
    own = times > 0
    means = (pairs @ times - own * pairs.diagonal()) / np.maximum(1, len(samples) - own)
    return dict(zip(places, means.tolist(), strict=True))


def _finished(one: Hypothesis) -> Caption:
    return (*one.tokens, END)


def _candidates(
    utility: dict[Caption, float], beams: set[Caption], config: DecodeConfig
) -> list[Caption]:
    """Of an image's samples the finished ones with words that no beam has found, those of highest utility."""
    finished = [
        caption
        for caption in utility
        if caption not in beams
        and caption[-1] == END
        and len(caption) > 1
        and not _repeats(caption[:-1], config.no_repeat_ngram)
    ]
    return sorted(finished, key=lambda caption: -utility[caption])[: config.mbr_candidates]


def _rank(
    candidates: list[Hypothesis], utility: dict[Caption, float], config: DecodeConfig
) -> list[Hypothesis]:
    def worth(one: Hypothesis) -> float:
        return one.score + config.mbr_weight * utility[_finished(one)]

    return sorted(candidates, key=worth, reverse=True)[: config.num_captions]


def _repeats(words: Caption, size: int) -> bool:
    """Whether an n-gram of ``size`` words occurs twice; never for size 0."""
    ngrams = [words[start : start + size] for start in range(len(words) - size + 1)]
    return size > 0 and len(set(ngrams)) < len(ngrams)


def _score(
    decoder: Decoder, features: Features, captions: list[list[Caption]], config: DecodeConfig
) -> list[list[Hypothesis]]:
    """Finished captions of every image as a search would have found them."""
    most = max(map(len, captions), default=0)
    if not most:
        return [[] for _ in captions]
    # Every image gets as many, the others an empty one more that is dropped again.
    padded = [[*some, *[(END,)] * (most - len(some))] for some in captions]
    flat = [caption for some in padded for caption in some]
    device = next(iter(features.values())).device
    tokens = torch.full((len(flat), max(map(len, flat))), PAD)
    for row, caption in enumerate(flat):
        tokens[row, : len(caption)] = torch.tensor(caption)
    tokens = tokens.to(device)
    state = start_captions(decoder, features, most)
    log_probs = torch.zeros(len(flat), device=device)
    steps: list[Tensor] = []
    last = torch.full_like(tokens[:, 0], START)
    for place in range(tokens.shape[1]):
        logits, state, attention = decoder.step(last, state)
        words = tokens[:, place]
        found = torch.log_softmax(logits.float(), dim=-1).gather(1, words.unsqueeze(1)).squeeze(1)
        log_probs += torch.where(words == PAD, 0.0, found)
        if attention is not None:
            steps.append(attention.float())
        # A finished caption goes on with <end>, which no decoder minds, as its words are not used.
        last = torch.where(words == PAD, END, words)
    maps = torch.stack(steps, dim=1) if steps else None  # one for every caption, word and cell
    numbers = log_probs.tolist()
    return [
        [
            Hypothesis(
                caption[:-1],
                number := numbers[image * most + place],
                normalized(number, len(caption) - 1, config.length_penalty),
                None if maps is None else maps[image * most + place, : len(caption) - 1],
            )
            for place, caption in enumerate(some)
        ]
        for image, some in enumerate(captions)
    ]


def _draw(
    decoder: Decoder, features: Features, config: DecodeConfig, constraint: Constraint
) -> list[list[Caption]]:
    """Samples of every image."""
    images = len(next(iter(features.values())))
    members = members_of(decoder)
    each = -(-config.mbr_samples // len(members))
    piece = max(1, _ROWS // each)
    drawn: list[list[Caption]] = [[] for _ in range(images)]
    for start in range(0, images, piece):
        some: Features = {name: tensor[start : start + piece] for name, tensor in features.items()}
        for seed, member in enumerate(members):
            noise = torch.Generator().manual_seed(seed)
            tokens, _ = sample(
                member,
                some,
                each,
                config.max_length,
                temperature=config.mbr_temperature,
                noise=noise,
                constraint=constraint,
            )
            for row, caption in enumerate(tokens[:, 1:].tolist()):
                drawn[start + row // each].append(tuple(word for word in caption if word != PAD))
    return drawn
