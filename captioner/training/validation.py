"""CIDEr-D of greedy captions, by which epochs may be compared."""

import torch
from torch import Tensor

from captioner.config import DecodeConfig
from captioner.decoders.base import Decoder
from captioner.decoding.beam import search
from captioner.decoding.cider import NGramFrequencies, cider_d
from captioner.text import END
from captioner.training.data import Batch, CaptionData


class GreedyCider:
    """CIDEr-D of greedy captions against the references of one split, on token ids with ``<end>`` for a word."""

    def __init__(self, data: CaptionData, max_length: int):
        """
        Args:
            max_length: words of the longest caption.
        """
        self.data = data
        self.decode = DecodeConfig(beam_size=1, max_length=max_length)
        references: dict[int, list[list[int]]] = {}
        for number, image in enumerate(data.image_rows.tolist()):
            references.setdefault(image, []).append(data.caption(number)[1:])
        self.frequencies = NGramFrequencies.count(references.values())
        self.references = {
            image: [self.frequencies.vector(caption) for caption in captions]
            for image, captions in references.items()
        }

    def sums(self, decoder: Decoder, batch: Batch) -> Tensor:
        """Summed CIDEr-D (0 to 10 each) of the images of a batch, and their number: float64 [2].

        Args:
            decoder: in evaluation mode.
            batch: of whole images, each once in a pass, on the decoder's device.
        """
        first = batch.captions[:, 0]
        images = self.data.image_rows[first[first >= 0]].tolist()
        # A worker to whom a step leaves nothing has an empty picture instead.
        found = search(decoder, batch.features, self.decode) if images else []
        scores = [
            cider_d(self.frequencies.vector([*candidates[0].tokens, END]), self.references[image])
            for image, candidates in zip(images, found, strict=True)
        ]
        return torch.tensor([sum(scores), len(scores)], dtype=torch.float64)
