"""Several decoders as one, which search and the teacher-forced loss use like any other.

The ensemble's probability of a word is the mean of its members', as in Sutskever et al., "Sequence to Sequence Learning
with Neural Networks" (2014) and most captioning papers since.

Shapes: B batch, T tokens, P grid cells, V vocabulary; M the members' output widths O added up.
"""

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from captioner.decoders.base import Decoder, Features, State
from captioner.errors import ModelError


class Ensemble(Decoder):
    """Decoders of one vocabulary and one encoder, of any kinds; its logits are log-probabilities."""

    def __init__(self, decoders: Sequence[Decoder]):
        """
        Args:
            decoders: none of them an ensemble itself.

        Raises:
            ModelError: there are no members, or their vocabularies differ in size.
        """
        super().__init__()
        self.members = nn.ModuleList(decoders)
        outputs = [cast(nn.Linear, member.output) for member in self.decoders]
        self.sizes = [one.in_features for one in outputs]
        vocabularies = sorted({one.out_features for one in outputs})
        if len(vocabularies) != 1:
            raise ModelError(
                f"an ensemble wants members of one vocabulary; their sizes: {vocabularies}"
            )
        self.columns = tuple(sorted({name for member in self.decoders for name in member.columns}))
        self.attends = any(member.attends for member in self.decoders)
        self.image_state = frozenset(
            f"{number}.{name}"
            for number, one in enumerate(self.decoders)
            for name in one.image_state
        )

    @property
    def decoders(self) -> list[Decoder]:
        """The members, typed."""
        return [cast(Decoder, member) for member in self.members]

    def hidden(self, features: Features, tokens: Tensor) -> Tensor:
        """What every member projects its logits from, side by side: float [B, T, M]."""
        return torch.cat([member.hidden(features, tokens) for member in self.decoders], dim=-1)

    def output(self, hidden: Tensor) -> Tensor:
        """Log-probabilities float [..., V] from ``hidden`` [..., M]."""
        parts = torch.split(hidden, self.sizes, dim=-1)
        return _mean([one.output(part) for one, part in zip(self.decoders, parts, strict=True)])

    def start(self, features: Features) -> State:
        return {
            f"{number}.{name}": tensor
            for number, member in enumerate(self.decoders)
            for name, tensor in member.start(features).items()
        }

    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State, Tensor | None]:
        """As ``Decoder.step``; the attention is the mean over the members that have one."""
        logits: list[Tensor] = []
        attentions: list[Tensor] = []
        new: State = {}
        for number, member in enumerate(self.decoders):
            prefix = f"{number}."
            own = {
                name.removeprefix(prefix): tensor
                for name, tensor in state.items()
                if name.startswith(prefix)
            }
            one, own, attention = member.step(tokens, own)
            logits.append(one)
            new |= {prefix + name: tensor for name, tensor in own.items()}
            if attention is not None:
                attentions.append(attention)
        return _mean(logits), new, torch.stack(attentions).mean(dim=0) if attentions else None


def members_of(decoder: Decoder) -> list[Decoder]:
    """The members of an ensemble; of a single decoder, itself."""
    return decoder.decoders if isinstance(decoder, Ensemble) else [decoder]


def _mean(logits: list[Tensor]) -> Tensor:
    """Logarithm of the mean of the members' probabilities: [..., V]."""
    log_probs = torch.stack([torch.log_softmax(one.float(), dim=-1) for one in logits])
    return torch.logsumexp(log_probs, dim=0) - math.log(len(logits))
