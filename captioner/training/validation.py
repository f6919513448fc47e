"""CIDEr-D of greedy captions, by which epochs may be compared."""

import numpy as np
import torch
from torch import Tensor

from captioner.config import DecodeConfig
from captioner.decoders.base import Decoder
from captioner.decoding.beam import search
from captioner.text import END, PAD
from captioner.training.data import Batch, CaptionData
from captioner.training.references import References


class GreedyCider:
    """CIDEr-D of greedy captions against the references of one split, on token ids with ``<end>`` for a word."""

    def __init__(self, data: CaptionData, max_length: int):
        """
        Args:
            max_length: words of the longest caption.
        """
        self.decode = DecodeConfig(beam_size=1, max_length=max_length)
        self.references = References(data)

    def sums(self, decoder: Decoder, batch: Batch) -> Tensor:
        """Summed CIDEr-D (0 to 10 each) of the images of a batch, and their number: float64 [2].

        Args:
            decoder: in evaluation mode.
            batch: of images that each come once in a pass, on the decoder's device.
        """
        images = batch.images
        if (images < 0).all():  # a worker to whom a step leaves nothing
            return torch.zeros(2, dtype=torch.float64)
        found = [
            candidates[0].tokens for candidates in search(decoder, batch.features, self.decode)
        ]
        captions = np.full((len(found), 1, 1 + max(map(len, found))), PAD)
        for row, tokens in enumerate(found):
            captions[row, 0, : len(tokens) + 1] = [*tokens, END]
        scores = self.references.scores(images, captions)
        return torch.tensor([scores.sum(), len(images)], dtype=torch.float64)
