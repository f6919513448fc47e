"""The objective of captions drawn from the decoder itself and rewarded by CIDEr-D.

Rennie et al., "Self-critical Sequence Training for Image Captioning" (2017), with the baseline of Luo, "A Better
Variant of Self-Critical Sequence Training" (2020): the mean reward of the image's other captions.

Shapes: I images, S captions drawn for each, T tokens.
"""

import numpy as np
import torch
from torch import Tensor, nn

from captioner.decoders.base import Decoder, Features
from captioner.decoders.ensemble import members_of
from captioner.decoding.sampling import sample
from captioner.training.plan import Indices
from captioner.training.references import References


class SelfCritical(nn.Module):
    """A decoder with this loss: what DDP wraps. Words and gradient come from one pass, with dropout on, for a policy
    gradient is that of the very distribution that the words were drawn from."""

    def __init__(self, decoder: Decoder, references: References, samples: int, max_length: int):
        """
        Args:
            samples: captions drawn for each image, two at least.
            max_length: words of the longest.
        """
        super().__init__()
        self.decoder, self.references = decoder, references
        self.samples, self.max_length = samples, max_length

    def forward(self, features: Features, tokens: Tensor, images: Indices) -> tuple[Tensor, Tensor]:
        """
        Args:
            features: columns of I images.
            tokens: not read.
            images: int64 [I], rows of the split; one below 0 counts for nothing.

        Returns:
            the loss, summed over images, of which the size says nothing; and the summed reward (CIDEr-D, 0 to 10) of
            the images, each the mean of its captions'. Of an ensemble they are means over its members, each of which
            draws its own captions.
        """
        found = [self._sums(member, features, images) for member in members_of(self.decoder)]
        losses, rewards = zip(*found, strict=True)
        return torch.stack(losses).mean(), torch.stack(rewards).mean()

    def _sums(self, decoder: Decoder, features: Features, images: Indices) -> tuple[Tensor, Tensor]:
        drawn, log_probs = sample(decoder, features, self.samples, self.max_length)
        captions = drawn[:, 1:].reshape(len(images), self.samples, -1).cpu().numpy()
        scores = self.references.scores(images, captions)
        rewards = torch.from_numpy(scores.astype(np.float32)).to(log_probs.device)
        # Each caption against the mean of the image's others.
        others = (rewards.sum(dim=1, keepdim=True) - rewards) / (self.samples - 1)
        loss = -((rewards - others).flatten().unsqueeze(1) * log_probs).sum() / self.samples
        return loss, rewards.mean(dim=1).sum()
