"""A small causal transformer that looks at the grid: Vaswani et al., "Attention Is All You Need" (2017), with the norms
before each block as in Xiong et al., "On Layer Normalization in the Transformer Architecture" (2020).

Shapes: N images, B captions, T tokens, W real words of all captions, P grid cells, D width, H heads, E = D / H.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from captioner.config import DecoderConfig
from captioner.decoders.attention import Attention, by_image
from captioner.decoders.base import Decoder, Features, Standardize, State, packs
from captioner.decoders.dropout import Dropout
from captioner.decoders.grid_encoder import GridEncoder, dense
from captioner.encoders.spec import FeatureShape
from captioner.text import PAD

# Longest caption in tokens: DecodeConfig allows 200 words, and the tags come on top.
POSITIONS = 202
_ROUND = 64


class Packing:
    """Where the real words of a batch of padded captions lie, so that most work is spent on (nearly) them alone."""

    def __init__(self, tokens: Tensor):
        self.shape = tokens.shape
        if not packs(tokens.device):
            self.places = torch.arange(tokens.numel(), device=tokens.device)
            return
        real = (tokens != PAD).flatten()
        # Rounded up with padding: oneDNN keeps buffers for every shape it has met.
        places = torch.argsort(~real, stable=True)[: -(-int(real.sum()) // _ROUND) * _ROUND]
        self.places = places.sort().values

    def pack(self, values: Tensor) -> Tensor:
        """[B, T, ...] -> the real words, [W, ...]."""
        return values.flatten(0, 1).index_select(0, self.places)

    def unpack(self, values: Tensor) -> Tensor:
        """[W, D] -> [B, T, D], zero at the padding."""
        padded = values.new_zeros(self.shape.numel(), values.shape[-1])
        return padded.index_copy(0, self.places, values).view(*self.shape, values.shape[-1])


class Block(nn.Module):
    """Attention over the words so far, attention over the picture, a dense layer; each added to what came in."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.words = Attention(width, heads)
        self.picture = Attention(width, heads)
        self.dense = dense(width, 4 * width, dropout)
        self.dropout = Dropout(dropout)

    def forward(self, values: Tensor, picture: Tensor, packing: Packing) -> Tensor:
        """Whole captions.

        Args:
            values: the real words [W, D].
            picture: keys and values of the cells of N images, each looked at by B / N captions in turn.
        """
        normed = self.norms[0](values)
        memory = self.words.split(packing.unpack(self.words.memory(normed)))
        query = packing.unpack(self.words.query(normed))
        found, _ = self.words.look(query, memory, causal=True)
        values = values + self.dropout(self.words.out(packing.pack(found)))
        query = packing.unpack(self.picture.query(self.norms[1](values)))
        found, _ = self.picture.look(by_image(query, len(picture)), picture)
        values = values + self.dropout(self.picture.out(packing.pack(found.reshape(query.shape))))
        added: Tensor = values + self.dropout(self.dense(self.norms[2](values)))
        return added

    def step(self, values: Tensor, past: Tensor, picture: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One word further.

        Args:
            values: the newest words [B, 1, D].
            past: keys and values of the words before, [B, 2, H, T, E].
            picture: as in ``forward``.

        Returns:
            values [B, 1, D], the past with the new words, and the attention over the cells [B, P].
        """
        normed = self.norms[0](values)
        past = torch.cat([past, self.words.split(self.words.memory(normed))], dim=3)
        found, _ = self.words.look(self.words.query(normed), past)
        values = values + self.dropout(self.words.out(found))
        query = self.picture.query(self.norms[1](values))
        found, weights = self.picture.look(by_image(query, len(picture)), picture)
        values = values + self.dropout(self.picture.out(found.reshape(query.shape)))
        values = values + self.dropout(self.dense(self.norms[2](values)))
        return values, past, weights.mean(dim=1).flatten(0, 1)


class TransformerDecoder(Decoder):
    """Words attend to the words before them and to the cells of the picture."""

    columns = ("grid",)
    attends = True

    def __init__(self, config: DecoderConfig, vocabulary_size: int, shape: FeatureShape):
        super().__init__()
        width = config.width
        self.standardize = Standardize("grid", shape)
        self.cells = nn.Linear(shape.grid_channels, width)
        self.picture = GridEncoder(config, shape)
        self.embedding = nn.Embedding(vocabulary_size, width)
        self.positions = nn.Parameter(torch.randn(POSITIONS, width) * 0.02)
        self.blocks: Sequence[Block] = nn.ModuleList(  # type: ignore[assignment]
            Block(width, config.heads, config.dropout) for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, vocabulary_size)
        self.dropout = Dropout(config.dropout)
        self.feature_dropout = Dropout(config.feature_dropout)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        if config.tie_embeddings:
            self.output.weight = self.embedding.weight
        self.image_state = frozenset(f"picture{number}" for number in range(config.layers))

    def look(self, features: Features) -> list[Tensor]:
        """Keys and values of the cells for every block, [N, 2, H, P, E] each."""
        cells = self.cells(self.feature_dropout(self.standardize(features)))
        cells = self.picture(cells)
        return [block.picture.split(block.picture.memory(cells)) for block in self.blocks]

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Tokens [...] at their positions [...]: [..., D]."""
        scaled = self.embedding(tokens) * self.embedding.embedding_dim**0.5
        embedded: Tensor = self.dropout(scaled + self.positions[positions])
        return embedded

    def hidden(self, features: Features, tokens: Tensor) -> Tensor:
        packing = Packing(tokens)
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        values = self.embed(packing.pack(tokens), packing.pack(positions))
        for block, picture in zip(self.blocks, self.look(features), strict=True):
            values = block(values, picture, packing)
        return packing.unpack(self.dropout(self.norm(values)))

    def start(self, features: Features) -> State:
        state = {}
        for number, picture in enumerate(self.look(features)):
            state[f"picture{number}"] = picture.contiguous()
            state[f"past{number}"] = picture[:, :, :, :0]
        return state

    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State, Tensor | None]:
        position = torch.full_like(tokens, state["past0"].shape[3])
        values = self.embed(tokens, position).unsqueeze(1)
        new: State = {}
        for number, block in enumerate(self.blocks):
            picture = state[f"picture{number}"]
            values, past, attention = block.step(values, state[f"past{number}"], picture)
            new |= {f"picture{number}": picture, f"past{number}": past}
        # The last block's look at the picture is the nearest to the word.
        return self.output(self.dropout(self.norm(values[:, 0]))), new, attention
