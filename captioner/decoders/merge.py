"""The notebook's merge decoder: the image leads the word sequence, and is added again to the LSTM's output.

Tanti et al., "Where to put the Image in an Image Caption Generator" (2018), name the two ways "pre-inject" and "merge".

Shapes: B batch, T tokens, C channels, D width, O output width, V vocabulary.
"""

import torch
from torch import Tensor, nn

from captioner.config import DecoderConfig
from captioner.decoders.base import Decoder, Features, Standardize, State, for_captions
from captioner.decoders.dropout import Dropout
from captioner.encoders.spec import FeatureShape


class MergeDecoder(Decoder):
    """``relu(image)`` and the words through one LSTM; each output plus the image through a dense layer to the words."""

    columns = ("pooled",)
    attends = False
    image_state = frozenset()

    def __init__(self, config: DecoderConfig, vocabulary_size: int, shape: FeatureShape):
        super().__init__()
        self.standardize = Standardize("pooled", shape)
        self.image = nn.Linear(shape.pooled_channels, config.width)
        self.embedding = nn.Embedding(vocabulary_size, config.width)
        self.lstm = nn.LSTM(config.width, config.width, batch_first=True)
        self.dense = nn.Linear(config.width, config.output_width)
        self.output = nn.Linear(config.output_width, vocabulary_size)
        self.dropout = Dropout(config.dropout)
        # Keras' initial embedding; torch's unit normal would drown the image at the start.
        nn.init.uniform_(self.embedding.weight, -0.05, 0.05)

    def project(self, features: Features) -> Tensor:
        """The image as a word: float [B, D]."""
        return torch.relu(self.image(self.standardize(features)))

    def read(self, image: Tensor, tokens: Tensor) -> Tensor:
        """LSTM outputs after the image, which leads its sequence, and after each token: float [B, 1 + T, D]."""
        sequence = torch.cat([image.unsqueeze(1), self.embedding(tokens).to(image.dtype)], dim=1)
        outputs: Tensor = self.lstm(sequence)[0]
        return outputs

    def merge(self, image: Tensor, output: Tensor) -> Tensor:
        """LSTM outputs and the image (broadcast over T) to what the logits are projected from, float [..., O]."""
        merged: Tensor = self.dropout(torch.relu(self.dense(self.dropout(output) + image)))
        return merged

    def hidden(self, features: Features, tokens: Tensor) -> Tensor:
        image = for_captions(self.project(features), len(tokens))
        return self.merge(image.unsqueeze(1), self.read(image, tokens)[:, 1:])

    def start(self, features: Features) -> State:
        image = self.project(features)
        _, (hidden, cell) = self.lstm(image.unsqueeze(1))
        return {"image": image, "hidden": hidden[0], "cell": cell[0]}

    def read_one(self, tokens: Tensor, state: State) -> State:
        """The state after one more token; its ``hidden`` [B, D] is the LSTM's output."""
        memory = (state["hidden"].unsqueeze(0), state["cell"].unsqueeze(0))
        _, (hidden, cell) = self.lstm(self.embedding(tokens).unsqueeze(1), memory)
        return state | {"hidden": hidden[0], "cell": cell[0]}

    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State, Tensor | None]:
        state = self.read_one(tokens, state)
        return self.output(self.merge(state["image"], state["hidden"])), state, None
