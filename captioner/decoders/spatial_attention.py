"""Soft attention over the picture: Xu et al., "Show, Attend and Tell" (2015), with its gate and deep output.

Shapes: B batch, T tokens, P grid cells, C channels, D width, A attention width, V vocabulary.
"""

import torch
from torch import Tensor, nn

from captioner.config import DecoderConfig
from captioner.decoders.attention import by_image
from captioner.decoders.base import Decoder, Features, Standardize, State, for_captions
from captioner.decoders.dropout import Dropout
from captioner.encoders.spec import FeatureShape


class SpatialAttentionDecoder(Decoder):
    """An LSTM that looks at a weighted mean of the grid's cells before every word."""

    columns = ("grid",)
    attends = True
    image_state = frozenset({"cells", "keys"})

    def __init__(self, config: DecoderConfig, vocabulary_size: int, shape: FeatureShape):
        super().__init__()
        width = config.width
        self.standardize = Standardize("grid", shape)
        # Once per image: the attention then works on D channels instead of the network's one or two thousand.
        self.cells = nn.Linear(shape.grid_channels, width)
        self.key = nn.Linear(width, config.attention_width)
        self.query = nn.Linear(width, config.attention_width)
        self.score = nn.Linear(config.attention_width, 1, bias=False)
        self.gate = nn.Linear(width, width)
        self.initial = nn.Linear(width, 2 * width)
        self.embedding = nn.Embedding(vocabulary_size, width)
        self.lstm = nn.LSTMCell(2 * width, width)
        self.deep = nn.Linear(3 * width, width)
        self.output = nn.Linear(width, vocabulary_size)
        self.dropout = Dropout(config.dropout)
        self.feature_dropout = Dropout(config.feature_dropout)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        if config.tie_embeddings:
            self.output.weight = self.embedding.weight

    def hidden(self, features: Features, tokens: Tensor) -> Tensor:
        state = self.start(features)
        for name in ("hidden", "cell"):
            state[name] = for_captions(state[name], len(tokens))
        words = self.embed(tokens)  # (B, T, D)
        outputs, contexts = [], []
        for word in words.unbind(dim=1):
            state, context, _ = self.look(word, state)
            outputs.append(state["hidden"])
            contexts.append(context)
        return self.deepen(words, torch.stack(outputs, dim=1), torch.stack(contexts, dim=1))

    def start(self, features: Features) -> State:
        cells = self.dropout(
            torch.relu(self.cells(self.feature_dropout(self.standardize(features))))
        )  # (B, P, D)
        hidden, cell = torch.tanh(self.initial(cells.mean(dim=1))).float().chunk(2, dim=1)
        return {"cells": cells, "keys": self.key(cells), "hidden": hidden, "cell": cell}

    def embed(self, tokens: Tensor) -> Tensor:
        """Tokens [...] as words [..., D]."""
        # As large as what they are read beside: an embedding that is also the output layer is small.
        embedded: Tensor = self.dropout(self.embedding(tokens) * self.embedding.embedding_dim**0.5)
        return embedded

    def look(self, word: Tensor, state: State) -> tuple[State, Tensor, Tensor]:
        """Attend, then read one word [B, D]: new state, context [B, D], attention [B, P].

        ``cells`` and ``keys`` may be those of fewer images, each looked at by equally many of the B captions.
        """
        hidden, cells = state["hidden"], state["cells"]
        queries = by_image(self.query(hidden).unsqueeze(1), len(cells)).unsqueeze(2)
        scores = self.score(torch.tanh(state["keys"].unsqueeze(1) + queries)).squeeze(-1)
        attention = torch.softmax(scores.float(), dim=-1)  # (N, B / N, P)
        found = (attention.to(cells.dtype) @ cells).flatten(0, 1)
        context = torch.sigmoid(self.gate(hidden)) * found
        inputs = torch.cat([word, context.to(word.dtype)], dim=1)
        hidden, cell = self.lstm(inputs, (hidden, state["cell"]))
        return state | {"hidden": hidden, "cell": cell}, context, attention.flatten(0, 1)

    def deepen(self, word: Tensor, hidden: Tensor, context: Tensor) -> Tensor:
        """The word, the LSTM and the picture together: what the logits are projected from, [..., D]."""
        joined = torch.cat([word, self.dropout(hidden), context.to(word.dtype)], dim=-1)
        deepened: Tensor = self.dropout(torch.tanh(self.deep(joined)))
        return deepened

    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State, Tensor | None]:
        word = self.embed(tokens)
        new, context, attention = self.look(word, state)
        return self.output(self.deepen(word, new["hidden"], context)), new, attention
