"""Training on captions drawn from the decoder itself, rewarded by CIDEr-D.

Rennie et al., "Self-critical Sequence Training for Image Captioning" (2017), with the baseline of Luo, "A Better
Variant of Self-Critical Sequence Training" (2020): the mean reward of the image's other captions.

Shapes: I images, S captions drawn for each, T tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from captioner.config import DecodeConfig, SelfCriticalConfig
from captioner.models.base import Decoder, Features
from captioner.models.sampling import sample
from captioner.models.search import search
from captioner.text import END, PAD
from captioner.training.data import Batch, CaptionData
from captioner.training.reward import Cider
from captioner.training.steps import autocast


class Critic:
    """Rewards for the images of one split."""

    def __init__(self, data: CaptionData, settings: SelfCriticalConfig):
        self.data, self.settings = data, settings
        references: dict[int, list[list[int]]] = {}
        for number, image in enumerate(data.image_rows.tolist()):
            references.setdefault(image, []).append(data.caption(number)[1:])
        self.place = {image: place for place, image in enumerate(references)}
        self.cider = Cider(list(references.values()))

    def images(self, batch: Batch) -> list[int]:
        """The images of a batch; none where a worker has nothing to do."""
        first = batch.captions[:, 0]
        return [int(self.data.image_rows[number]) for number in first if number >= 0]

    def reward(self, image: int, words: Sequence[int]) -> float:
        """CIDEr-D of a caption without ``<start>``; an ``<end>`` counts as a word."""
        return self.cider.score(self.place[image], words)

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
        model: ``TeacherForcing``, wrapped in DDP or not.
        features: those of ``batch``, on the device of the model.
        compute: ``float32`` or ``bfloat16``.

    Returns:
        float64 [2]: summed reward of the captions drawn, and their number.
    """
    samples = critic.settings.samples
    device = next(iter(features.values())).device
    images = critic.images(batch)
    model.eval()
    wrapped: Any = getattr(model, "module", model)
    decoder: Decoder = wrapped.decoder
    with autocast(device, compute):
        # Outside of inference mode, whose tensors no gradient may pass.
        tokens = sample(decoder, features, samples, critic.settings.max_length).clone()
    rewards = torch.zeros(len(tokens) // samples, samples)
    for place, caption in enumerate(tokens[:, 1:].tolist()[: len(images) * samples]):
        words = [word for word in caption if word != PAD]
        rewards.view(-1)[place] = critic.reward(images[place // samples], words)
    # Each caption against the mean of the image's others.
    advantage = (rewards - rewards.mean(dim=1, keepdim=True)) * (samples / (samples - 1))
    # A policy gradient is that of the distribution the captions were drawn from: dropout would give it another, and its
    # error grows with every step. In training mode all the same, as cuDNN's LSTM has no backward pass in the other.
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    with autocast(device, compute):
        loss, _ = model(features, tokens, advantage.flatten().to(device))
    optimizer.zero_grad(set_to_none=True)
    (loss * (workers / batch.global_targets)).backward()
    if clip_norm is not None:
        nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    optimizer.step()
    return torch.tensor([float(rewards.sum()), len(images) * samples], dtype=torch.float64)
