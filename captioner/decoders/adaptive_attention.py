"""Attention over the picture by what the words so far ask for: Lu et al., "Knowing When to Look" (2017).

There the LSTM's output looks at the picture, and what it finds goes to the next word alone, not back into the LSTM as
in "Show, Attend and Tell". The attention of a whole caption is then one product of matrices, and training faster. Here
it has several heads of dot products, and no sentinel: the dense layer before the words weighs the LSTM's output against
what was found.

Shapes: N images, B captions, T tokens, P grid cells, C channels, D width, H heads, E = D / H, V vocabulary.
"""

import torch
from torch import Tensor, nn

from captioner.config import DecoderConfig
from captioner.decoders.attention import Attention, by_image
from captioner.decoders.base import Decoder, Features, Standardize, State, for_captions
from captioner.decoders.dropout import Dropout
from captioner.decoders.grid_encoder import GridEncoder
from captioner.encoders.spec import FeatureShape


class AdaptiveAttentionDecoder(Decoder):
    """An LSTM over the words and the whole picture, whose every output looks at the grid's cells."""

    columns = ("grid",)
    attends = True
    image_state = frozenset({"image", "memory"})

    def __init__(self, config: DecoderConfig, vocabulary_size: int, shape: FeatureShape):
        super().__init__()
        width = config.width
        self.standardize = Standardize("grid", shape)
        self.cells = nn.Linear(shape.grid_channels, width)
        self.picture: nn.Module = nn.ReLU()
        if config.picture_layers:
            self.picture = GridEncoder(config, shape)
        self.image = nn.Linear(width, width)
        self.initial = nn.Linear(width, 2 * width)
        self.embedding = nn.Embedding(vocabulary_size, width)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.attention = Attention(width, config.heads)
        self.deep = nn.Linear(2 * width, width)
        self.output = nn.Linear(width, vocabulary_size)
        self.dropout = Dropout(config.dropout)
        self.feature_dropout = Dropout(config.feature_dropout)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        for name, weight in self.lstm.named_parameters():
            if name.startswith("weight_hh"):
                nn.init.orthogonal_(weight)
        if config.tie_embeddings:
            self.output.weight = self.embedding.weight

    def start(self, features: Features) -> State:
        cells = self.cells(self.feature_dropout(self.standardize(features)))
        cells = self.dropout(self.picture(cells))  # (N, P, D)
        image = self.image(cells.mean(dim=1))  # (N, D)
        hidden, cell = torch.tanh(self.initial(torch.relu(image))).float().chunk(2, dim=1)
        memory = self.attention.split(self.attention.memory(cells))  # (N, 2, H, P, E)
        return {"image": image, "memory": memory, "hidden": hidden, "cell": cell}

    def hidden(self, features: Features, tokens: Tensor) -> Tensor:
        state = self.start(features)
        for name in ("hidden", "cell"):
            state[name] = for_captions(state[name], len(tokens))
        return self.read(tokens, state)[0]

    def read(self, tokens: Tensor, state: State) -> tuple[Tensor, State, Tensor]:
        """Words [B, T] after those that made the state.

        Returns:
            what the logits are projected from [B, T, D], the new state, and the attention of each image's captions in
            turn, float32 [N, H, B / N * T, P].
        """
        # As large as what the LSTM adds to them: an embedding that is also the output layer is small.
        words = self.dropout(self.embedding(tokens) * self.embedding.embedding_dim**0.5)
        # The whole picture comes with every word.
        inputs = words + for_captions(state["image"], len(tokens)).unsqueeze(1)
        memory = tuple(state[name].unsqueeze(0).contiguous() for name in ("hidden", "cell"))
        outputs, (hidden, cell) = self.lstm(inputs, memory)
        outputs = self.dropout(outputs)
        query = self.attention.query(outputs)
        found, weights = self.attention.look(by_image(query, len(state["memory"])), state["memory"])
        joined = torch.cat([words.to(outputs.dtype), outputs], dim=-1)
        looked = self.attention.out(found.reshape(query.shape))
        deepened = self.dropout(torch.tanh(self.deep(joined) + looked))
        return deepened, state | {"hidden": hidden[0], "cell": cell[0]}, weights

    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State, Tensor | None]:
        deepened, new, weights = self.read(tokens.unsqueeze(1), state)
        attention = weights.mean(dim=1).flatten(0, 1)  # (B, P)
        return self.output(deepened[:, 0]), new, attention
