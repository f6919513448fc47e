"""Training on captions drawn from the decoder itself, rewarded by CIDEr-D.

Rennie et al., "Self-critical Sequence Training for Image Captioning" (2017), with the baseline of Luo, "A Better
Variant of Self-Critical Sequence Training" (2020): the mean reward of the image's other captions.

Shapes: M members of an ensemble (1 of a single decoder), I images, S captions drawn for each, T tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from captioner.config import DecodeConfig, SelfCriticalConfig
from captioner.decoders.base import Decoder, Features
from captioner.decoders.ensemble import members_of
from captioner.decoding.beam import search
from captioner.decoding.cider import NGramFrequencies, cider_d
from captioner.decoding.sampling import sample
from captioner.text import END, PAD
from captioner.training.data import Batch, CaptionData
from captioner.training.steps import autocast


class Critic:
    """Rewards for the images of one split."""

    def __init__(self, data: CaptionData, settings: SelfCriticalConfig):
        self.data, self.settings = data, settings
        references: dict[int, list[list[int]]] = {}
        for number, image in enumerate(data.image_rows.tolist()):
            references.setdefault(image, []).append(data.caption(number)[1:])
        self.frequencies = NGramFrequencies.count(references.values())
        self.references = {
            image: [self.frequencies.vector(caption) for caption in captions]
            for image, captions in references.items()
        }

    def images(self, batch: Batch) -> list[int]:
        """The images of a batch; none where a worker has nothing to do."""
        first = batch.captions[:, 0]
        return [int(self.data.image_rows[number]) for number in first if number >= 0]

    def reward(self, image: int, words: Sequence[int]) -> float:
        """CIDEr-D of a caption without ``<start>``; an ``<end>`` counts as a word."""
        return cider_d(self.frequencies.vector(words), self.references[image])

    def greedy(self, decoder: Decoder, features: Features, images: Sequence[int]) -> Tensor:
        """Summed reward of the images' most probable captions, and their number: float64 [2]."""
        if not images:
            return torch.zeros(2, dtype=torch.float64)
        decode = DecodeConfig(beam_size=1, max_length=self.settings.max_length)
        found = search(decoder, features, decode)
        rewards = [
            self.reward(image, [*candidates[0].tokens, END])
            for image, candidates in zip(images, found, strict=True)
        ]
        return torch.tensor([sum(rewards), len(rewards)], dtype=torch.float64)


class Drawing(nn.Module):
    """A decoder that draws captions: what DDP wraps in this phase, so that their gradient is that of one ``forward``.

    A policy gradient is that of the very distribution the captions were drawn from. So words and gradient come from one
    pass, in which dropout is on as in the phase before: the decoder does not learn the train images by heart so soon.
    """

    def __init__(self, decoder: Decoder, settings: SelfCriticalConfig):
        super().__init__()
        self.decoder, self.settings = decoder, settings

    def forward(self, features: Features) -> tuple[Tensor, Tensor]:
        """Captions of I images from each member alone: what ``sample`` returns, [M, I * S, T] and [M, I * S, T - 1]."""
        samples, longest = self.settings.samples, self.settings.max_length
        drawn = [sample(member, features, samples, longest) for member in members_of(self.decoder)]
        length = max(tokens.shape[1] for tokens, _ in drawn)
        return (
            torch.stack([_padded(tokens, length, PAD) for tokens, _ in drawn]),
            torch.stack([_padded(log_probs, length - 1, 0.0) for _, log_probs in drawn]),
        )


def _padded(values: Tensor, length: int, value: float) -> Tensor:
    return functional.pad(values, (0, length - values.shape[1]), value=value)


def self_critical_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    features: Features,
    batch: Batch,
    critic: Critic,
    *,
    workers: int,
    clip_norm: float | None,
    compute: str,
) -> Tensor:
    """One optimizer step on captions drawn for a worker's share of the images.

    Args:
        model: ``Drawing``, wrapped in DDP or not, in training mode.
        features: those of ``batch``, on the device of the model.
        compute: ``float32`` or ``bfloat16``.

    Returns:
        float64 [3]: summed reward of the captions drawn, their number, and the loss, whose size means nothing but that
        it is finite.
    """
    images = critic.images(batch)
    column = next(iter(features.values()))
    device = column.device
    with autocast(device, compute):
        tokens, log_probs = model(features)
    samples = tokens.shape[1] // len(column)
    rewards = torch.zeros(len(tokens), len(column), samples)
    for member, captions in enumerate(tokens[:, :, 1:].tolist()):
        for place, caption in enumerate(captions[: len(images) * samples]):
            image, number = divmod(place, samples)
            words = [word for word in caption if word != PAD]
            rewards[member, image, number] = critic.reward(images[image], words)
    # Each caption against the mean of the image's others.
    advantage = (rewards - rewards.mean(dim=-1, keepdim=True)) * (samples / (samples - 1))
    # Of an ensemble the mean over its members, as under teacher forcing.
    loss = -(advantage.flatten(1).unsqueeze(-1).to(device) * log_probs).sum() / len(tokens)
    optimizer.zero_grad(set_to_none=True)
    (loss * (workers / batch.global_targets)).backward()
    if clip_norm is not None:
        nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    optimizer.step()
    captions = len(tokens) * len(images) * samples
    return torch.tensor([float(rewards.sum()), captions, float(loss.detach())], dtype=torch.float64)
