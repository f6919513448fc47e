"""Soft attention over the picture: Xu et al., "Show, Attend and Tell" (2015), with its gate and deep output.

Shapes: B batch, T tokens, P grid cells, C channels, D width, A attention width, V vocabulary.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from captioner.config import DecoderConfig
from captioner.decoders.base import Decoder, Features, Standardize, State, for_captions
from captioner.decoders.dropout import Dropout


class SpatialAttentionDecoder(Decoder):
    """An LSTM that looks at a weighted mean of the grid's cells before every word."""

    columns = ("grid",)
    image_state = frozenset({"cells", "keys"})

    def __init__(self, config: DecoderConfig, vocabulary_size: int, channels: int):
        super().__init__()
        width = config.width
        self.standardize = Standardize(channels)
        # Once per image: the attention then works on D channels instead of the network's one or two thousand.
        self.cells = nn.Linear(channels, width)
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
        # Makes words as large as what they are read beside: an embedding that is also the output layer is small.
        # Among the weights, so that models from before it are refused instead of captioning nonsense.
        self.register_buffer("word_scale", torch.tensor(width**0.5))
        self.word_scale: Tensor
        if config.tie_embeddings:
            self.output.weight = self.embedding.weight

    def hidden(self, features: Features, tokens: Tensor) -> Tensor:
        state = self.start(features)
        for name in ("hidden", "cell"):
            state[name] = for_captions(state[name], len(tokens))
        words = self.dropout(self.embedding(tokens) * self.word_scale)  # (B, T, D)
        weights = self.weights()
        outputs, contexts = [], []
        for gates in self.read(words, weights).unbind(dim=1):  # of all words at once
            state, context, _ = self.look(gates, state, weights)
            outputs.append(state["hidden"])
            contexts.append(context)
        return self.deepen(words, torch.stack(outputs, dim=1), torch.stack(contexts, dim=1))

    def start(self, features: Features) -> State:
        cells = self.dropout(
            torch.relu(self.cells(self.feature_dropout(self.standardize(features["grid"]))))
        )  # (B, P, D)
        hidden, cell = torch.tanh(self.initial(cells.mean(dim=1))).chunk(2, dim=1)
        return {"cells": cells, "keys": self.key(cells), "hidden": hidden, "cell": cell}

    def weights(self) -> dict[str, Tensor]:
        """What words are multiplied by. Cast here, under teacher forcing once for a caption: autocasting would cast a
        slice at every word."""
        width = self.embedding.embedding_dim
        found = {
            "word": self.lstm.weight_ih[:, :width],
            "word bias": self.lstm.bias_ih + self.lstm.bias_hh,
            "context": self.lstm.weight_ih[:, width:],
            "hidden": self.lstm.weight_hh,
            "query and gate": torch.cat([self.query.weight, self.gate.weight]),
            "query and gate bias": torch.cat([self.query.bias, self.gate.bias]),
        }
        device = self.embedding.weight.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            found = {name: tensor.to(dtype) for name, tensor in found.items()}
        return found

    def read(self, words: Tensor, weights: dict[str, Tensor]) -> Tensor:
        """The words' share of the LSTM's gates: [..., D] -> [..., 4 D]."""
        return functional.linear(words, weights["word"], weights["word bias"])

    def look(
        self, gates: Tensor, state: State, weights: dict[str, Tensor]
    ) -> tuple[State, Tensor, Tensor]:
        """Attend, then read one word: gates [B, 4 D] -> new state, context [B, D], attention [B, P].

        ``cells`` and ``keys`` may be those of fewer images, each looked at by equally many of the B captions.
        """
        hidden, cells = state["hidden"], state["cells"]
        images = len(cells)
        asked = functional.linear(hidden, weights["query and gate"], weights["query and gate bias"])
        query, gate = torch.split(asked, [self.query.out_features, self.gate.out_features], dim=1)
        captions = len(hidden) // max(1, images)
        queries = query.reshape(images, captions, self.query.out_features)
        pairs = torch.tanh(state["keys"].unsqueeze(1) + queries.unsqueeze(2))
        attention = torch.softmax(self.score(pairs).squeeze(-1).float(), dim=-1)
        context = (attention.to(cells.dtype) @ cells).flatten(0, 1)
        context = torch.sigmoid(gate) * context
        gates = (
            gates
            + functional.linear(context, weights["context"])
            + functional.linear(hidden, weights["hidden"])
        )
        # torch's order, and its cell: nn.LSTMCell would multiply by the word's weights at every word.
        inputs, forget, update, output = gates.float().chunk(4, dim=1)
        cell = torch.sigmoid(forget) * state["cell"] + torch.sigmoid(inputs) * torch.tanh(update)
        hidden = torch.sigmoid(output) * torch.tanh(cell)
        return state | {"hidden": hidden, "cell": cell}, context, attention.flatten(0, 1)

    def deepen(self, word: Tensor, hidden: Tensor, context: Tensor) -> Tensor:
        """The word, the LSTM and the picture together: what the logits are projected from, [..., D]."""
        joined = torch.cat([word, self.dropout(hidden), context.to(word.dtype)], dim=-1)
        deepened: Tensor = self.dropout(torch.tanh(self.deep(joined)))
        return deepened

    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State, Tensor | None]:
        word, weights = self.dropout(self.embedding(tokens) * self.word_scale), self.weights()
        new, context, attention = self.look(self.read(word, weights), state, weights)
        return self.output(self.deepen(word, new["hidden"], context)), new, attention
