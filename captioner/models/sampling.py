"""Captions drawn at random from a decoder's own distribution."""

import torch
from torch import Tensor

from captioner.models.base import Decoder, Features
from captioner.text import END, PAD, START, UNK


@torch.inference_mode()
def sample(decoder: Decoder, features: Features, count: int, max_length: int) -> Tensor:
    """Draw ``count`` captions for each image, from torch's default generator.

    Args:
        features: columns of N images.
        max_length: longest caption, in words.

    Returns:
        int64 [N * count, T], ``<start>`` first, ``<end>`` last where the caption came to its end, ``<pad>`` after it;
        the captions of an image follow each other.
    """
    state = decoder.start(features)
    kept = decoder.image_state
    state = {
        name: tensor if name in kept else tensor.repeat_interleave(count, dim=0)
        for name, tensor in state.items()
    }
    images, device = len(next(iter(features.values()))), next(iter(features.values())).device
    last = torch.full((images * count,), START, device=device)
    open_ended = torch.ones_like(last, dtype=torch.bool)
    words = [last]
    for _ in range(max_length + 1):
        logits, state, _ = decoder.step(last, state)
        logits = logits.float()
        logits[:, [PAD, START, UNK]] = -torch.inf
        # The largest of logits plus Gumbel noise is a draw from their softmax.
        drawn = (logits - torch.empty_like(logits).exponential_().log_()).argmax(dim=-1)
        words.append(torch.where(open_ended, drawn, PAD))
        # A finished caption goes on with <end>, which no decoder minds, as its words are not used.
        last = torch.where(open_ended, drawn, END)
        open_ended = open_ended & (drawn != END)
        if not open_ended.any():
            break
    return torch.stack(words, dim=1)
