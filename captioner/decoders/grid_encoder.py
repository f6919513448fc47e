"""The grid's cells as a sequence that attends to itself before words look at it, as a transformer's encoder does:
Vaswani et al., "Attention Is All You Need" (2017).

Shapes: B images, P grid cells, D width.
"""

import torch
from torch import Tensor, nn

from captioner.config import DecoderConfig
from captioner.decoders.attention import Attention
from captioner.decoders.dropout import Dropout
from captioner.encoders.spec import FeatureShape


def dense(width: int, inner: int, dropout: float) -> nn.Sequential:
    """The layer that works on each position alone, ``inner`` wide within."""
    return nn.Sequential(
        nn.Linear(width, inner), nn.GELU(), Dropout(dropout), nn.Linear(inner, width)
    )


class GridBlock(nn.Module):
    """Attention of the cells to each other and a dense layer, each added to what came in: [B, P, D] -> [B, P, D]."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.cells = Attention(width, heads)
        # Half of what is usual: an image has four times as many cells as a caption has words.
        self.dense = dense(width, 2 * width, dropout)
        self.dropout = Dropout(dropout)

    def forward(self, values: Tensor) -> Tensor:
        normed = self.norms[0](values)
        cells = self.cells
        found, _ = cells.look(cells.query(normed), cells.split(cells.memory(normed)))
        values = values + self.dropout(cells.out(found))
        added: Tensor = values + self.dropout(self.dense(self.norms[1](values)))
        return added


class GridEncoder(nn.Module):
    """Positions of rows and columns, ``picture_layers`` blocks, and a norm: [B, P, D] -> [B, P, D]."""

    def __init__(self, config: DecoderConfig, shape: FeatureShape):
        super().__init__()
        width = config.width
        self.row_positions = nn.Parameter(torch.randn(shape.rows, 1, width) * 0.02)
        self.column_positions = nn.Parameter(torch.randn(1, shape.columns, width) * 0.02)
        self.blocks = nn.ModuleList(
            GridBlock(width, config.heads, config.dropout) for _ in range(config.picture_layers)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, cells: Tensor) -> Tensor:
        cells = cells + (self.row_positions + self.column_positions).flatten(0, 1)
        for block in self.blocks:
            cells = block(cells)
        normed: Tensor = self.norm(cells)
        return normed
