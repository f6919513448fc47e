"""Captions sampled from a decoder's own distribution."""

import torch
from torch import Tensor

from captioner.decoders.base import Decoder, Features, start_captions
from captioner.decoding.constraint import FREE, Constraint
from captioner.text import END, PAD, START, UNK


def sample(
    decoder: Decoder,
    features: Features,
    count: int,
    max_length: int,
    *,
    temperature: float = 1.0,
    noise: torch.Generator | None = None,
    constraint: Constraint = FREE,
) -> tuple[Tensor, Tensor]:
    """Sample ``count`` captions for each image.

    Args:
        features: columns of N images.
        max_length: words before ``<end>``; a caption that has not ended then has one word more, and no ``<end>``.
        temperature: what the logits are divided by.
        noise: a generator on the CPU whose numbers all images share, so that the samples of one depend neither on
            the others nor on the device; default: torch's own, and every image has its own numbers.
        constraint: what the samples begin with and do not contain.

    Returns:
        int64 [N * count, T], ``<start>`` first, ``<end>`` last where the caption came to its end, ``<pad>`` after it;
        the captions of an image follow each other. And float32 [N * count, T - 1], the log-probability each target
        token was sampled with, 0 at the padding; gradients pass through it.
    """
    state = start_captions(decoder, features, count)
    images, device = len(next(iter(features.values()))), next(iter(features.values())).device
    last = torch.full((images * count,), START, device=device)
    open_ended = torch.ones_like(last, dtype=torch.bool)
    words, found = [last], []
    impossible = torch.tensor([PAD, START, UNK, *constraint.forbidden], device=device)
    for place in range(max_length + 1):
        logits, state, _ = decoder.step(last, state)
        logits = logits.float() / temperature
        forced = constraint.forced(place)
        if forced is None:
            logits = logits.index_fill(1, impossible, -torch.inf)
        log_probs = torch.log_softmax(logits, dim=-1)
        with torch.no_grad():
            # The largest of log-probabilities plus Gumbel noise is a draw from them.
            if noise is None:
                numbers = torch.empty_like(log_probs).exponential_()
            else:
                shared = torch.empty(count, log_probs.shape[1]).exponential_(generator=noise)
                numbers = shared.to(device).repeat(images, 1)
            drawn = (log_probs - numbers.log_()).argmax(dim=-1)
            if forced is not None:
                drawn = torch.full_like(drawn, forced)
        words.append(torch.where(open_ended, drawn, PAD))
        found.append(log_probs.gather(1, drawn.unsqueeze(1)).squeeze(1) * open_ended)
        # A finished caption goes on with <end>, which no decoder minds, as its words are not used.
        last = torch.where(open_ended, drawn, END)
        open_ended = open_ended & (drawn != END)
        if not open_ended.any():
            break
    return torch.stack(words, dim=1), torch.stack(found, dim=1)
