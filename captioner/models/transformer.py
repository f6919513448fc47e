"""A small causal transformer that looks at the grid: Vaswani et al., "Attention Is All You Need" (2017), with the norms
before each block as in Xiong et al., "On Layer Normalization in the Transformer Architecture" (2020).

Shapes: B batch, T tokens, P grid cells, C channels, D width, H heads, E = D / H, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from captioner.config import DecoderConfig
from captioner.models.base import Features, Standardize, State
from captioner.schema import GRID_SIDE

# Longest caption in tokens: DecodeConfig allows 200 words, and the tags come on top.
POSITIONS = 202


class Attention(nn.Module):
    """Multi-head attention whose keys and values are made apart from its queries, so that they can be kept."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.memory = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def remember(self, values: Tensor) -> Tensor:
        """Keys and values of a sequence [B, S, D]: [B, 2, H, S, E]."""
        batch, length, width = values.shape
        split = self.memory(values).reshape(batch, length, 2, self.heads, width // self.heads)
        memory: Tensor = split.permute(0, 2, 3, 1, 4)
        return memory

    def forward(self, values: Tensor, memory: Tensor, *, causal: bool = False) -> Tensor:
        """Attend from values [B, T, D] to memory [B, 2, H, S, E]."""
        found = functional.scaled_dot_product_attention(
            self.split(values), memory[:, 0], memory[:, 1], is_causal=causal
        )
        joined: Tensor = self.out(found.transpose(1, 2).flatten(2))
        return joined

    def weights(self, values: Tensor, memory: Tensor) -> Tensor:
        """Attention weights, the mean over heads: [B, T, S]."""
        query = self.split(values)
        scores = query @ memory[:, 0].mT / query.shape[-1] ** 0.5
        return torch.softmax(scores.float(), dim=-1).mean(dim=1)

    def split(self, values: Tensor) -> Tensor:
        """Queries of every head: [B, H, T, E]."""
        queries: Tensor = self.query(values).unflatten(2, (self.heads, -1)).transpose(1, 2)
        return queries


class Block(nn.Module):
    """Attention over the words so far, attention over the picture, a dense layer; each added to what came in."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.words = Attention(width, heads)
        self.picture = Attention(width, heads)
        self.dense = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * width, width)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, values: Tensor, past: Tensor | None, picture: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """
        Args:
            values: [B, T, D], the whole caption (``past`` None) or its newest word.
            past: keys and values of the words before.
            picture: keys and values of the cells of N images, each looked at by B / N captions in turn.

        Returns:
            values [B, T, D], the past with the new words, and what the picture was looked at with [N, T * B / N, D].
        """
        normed = self.norms[0](values)
        memory = self.words.remember(normed)
        if past is not None:
            memory = torch.cat([past, memory], dim=3)
        values = values + self.dropout(self.words(normed, memory, causal=past is None))
        # The captions of an image become queries of one attention, which spares its cells a copy for each.
        query = self.norms[1](values)
        images, captions = len(picture), len(values) // max(1, len(picture))
        query = query.reshape(images, captions * values.shape[1], values.shape[2])
        values = values + self.dropout(self.picture(query, picture)).view_as(values)
        return values + self.dropout(self.dense(self.norms[2](values))), memory, query


class TransformerDecoder(nn.Module):
    """Words attend to the words before them and to the cells of the picture."""

    columns: tuple[str, ...] = ("grid",)

    def __init__(self, config: DecoderConfig, vocabulary_size: int, channels: int):
        super().__init__()
        width = config.width
        self.standardize = Standardize(channels)
        self.cells = nn.Linear(channels, width)
        self.row_positions = nn.Parameter(torch.randn(GRID_SIDE, 1, width) * 0.02)
        self.column_positions = nn.Parameter(torch.randn(1, GRID_SIDE, width) * 0.02)
        self.cells_norm = nn.LayerNorm(width)
        self.embedding = nn.Embedding(vocabulary_size, width)
        self.positions = nn.Parameter(torch.randn(POSITIONS, width) * 0.02)
        self.blocks: Sequence[Block] = nn.ModuleList(  # type: ignore[assignment]
            Block(width, config.heads, config.dropout) for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, vocabulary_size)
        self.dropout = nn.Dropout(config.dropout)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        if config.tie_embeddings:
            self.output.weight = self.embedding.weight
        self.image_state = frozenset(f"picture{number}" for number in range(config.layers))

    def picture(self, features: Features) -> list[Tensor]:
        """Keys and values of the cells for every block, [B, 2, H, P, E] each."""
        cells = self.cells(self.dropout(self.standardize(features["grid"])))
        cells = self.cells_norm(cells + (self.row_positions + self.column_positions).flatten(0, 1))
        return [block.picture.remember(cells) for block in self.blocks]

    def embed(self, tokens: Tensor, first: int) -> Tensor:
        """Tokens [B, T] at positions from ``first`` on: [B, T, D]."""
        scaled = self.embedding(tokens) * self.embedding.embedding_dim**0.5
        embedded: Tensor = self.dropout(scaled + self.positions[first : first + tokens.shape[1]])
        return embedded

    def hidden(self, features: Features, tokens: Tensor) -> Tensor:
        values = self.embed(tokens, 0)
        for block, picture in zip(self.blocks, self.picture(features), strict=True):
            values, _, _ = block(values, None, picture)
        normed: Tensor = self.dropout(self.norm(values))
        return normed

    def forward(self, features: Features, tokens: Tensor) -> Tensor:
        logits: Tensor = self.output(self.hidden(features, tokens))
        return logits

    def start(self, features: Features) -> State:
        state = {}
        for number, picture in enumerate(self.picture(features)):
            state[f"picture{number}"] = picture.contiguous()
            state[f"past{number}"] = picture[:, :, :, :0]
        return state

    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State, Tensor | None]:
        values = self.embed(tokens.unsqueeze(1), state["past0"].shape[3])
        new: State = {}
        for number, block in enumerate(self.blocks):
            picture = state[f"picture{number}"]
            values, past, query = block(values, state[f"past{number}"], picture)
            new |= {f"picture{number}": picture, f"past{number}": past}
        # The last block's look at the picture is the nearest to the word.
        attention = self.blocks[-1].picture.weights(query, picture).flatten(0, 1)
        return self.output(self.norm(values[:, 0])), new, attention
