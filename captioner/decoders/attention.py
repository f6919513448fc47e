"""Multi-head dot-product attention: Vaswani et al., "Attention Is All You Need" (2017).

Shapes: N images, B captions, T queries, S places that are looked at, D width, H heads, E = D / H.
"""

import torch
from torch import Tensor, nn

from captioner.errors import ConfigError


class Attention(nn.Module):
    """Multi-head attention whose keys and values are made apart from its queries, so that they can be kept."""

    def __init__(self, width: int, heads: int):
        """
        Raises:
            ConfigError: the heads do not divide the width.
        """
        super().__init__()
        if width % heads:
            raise ConfigError(f"decoder.heads: {heads} must divide width {width}")
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.memory = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def split(self, memory: Tensor) -> Tensor:
        """Projected keys and values of a sequence [B, S, 2 * D] by head: [B, 2, H, S, E]."""
        batch, length, width = memory.shape
        by_head = memory.view(batch, length, 2, self.heads, width // (2 * self.heads))
        return by_head.permute(0, 2, 3, 1, 4)

    def look(self, query: Tensor, memory: Tensor, *, causal: bool = False) -> tuple[Tensor, Tensor]:
        """Attend from projected queries [B, T, D] to memory [B, 2, H, S, E].

        Returns:
            what was found, before ``out`` [B, T, D], and the weights float32 [B, H, T, S].
        """
        # By hand: with scaled_dot_product_attention of torch 2.15 a transformer's training step takes 91 % longer in
        # bfloat16 on a CPU, adaptive_attention's 21 %, and in float32 as long.
        batch, length, width = query.shape
        heads = query.view(batch, length, self.heads, width // self.heads).transpose(1, 2)
        scores = heads @ memory[:, 0].mT * heads.shape[-1] ** -0.5
        if causal:
            ahead = torch.full(scores.shape[-2:], -torch.inf, device=scores.device).triu(1)
            scores = scores + ahead.to(scores.dtype)
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32)
        found = weights.to(memory.dtype) @ memory[:, 1]
        return found.transpose(1, 2).flatten(2), weights


def by_image(query: Tensor, images: int) -> Tensor:
    """Queries [B, T, D] of the captions of each image as those of one attention: [N, B / N * T, D].

    It spares an image's cells a copy for each of its captions.
    """
    captions, words, width = query.shape
    return query.reshape(images, captions // max(1, images) * words, width)
