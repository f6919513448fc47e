"""The notebook's attention decoder: it attends over the words so far, not over the picture.

Additive attention (Bahdanau et al., "Neural Machine Translation by Jointly Learning to Align and Translate", 2015) of
the LSTM's last output over its own outputs. The notebook trained one prefix at a time; here every position attends to
itself and to those before it, so that one pass over a whole caption gives the same losses.

Shapes: B batch, T tokens, S positions attended to, A attention width, D width, V vocabulary.
"""

import torch
from torch import Tensor, nn

from captioner.config import DecoderConfig
from captioner.decoders.base import Features, State, for_captions
from captioner.decoders.merge import MergeDecoder
from captioner.encoders.spec import FeatureShape


class SequenceAttentionDecoder(MergeDecoder):
    """The merge decoder with attention over its LSTM's outputs in place of the last output."""

    def __init__(self, config: DecoderConfig, vocabulary_size: int, shape: FeatureShape):
        super().__init__(config, vocabulary_size, shape)
        self.query = nn.Linear(config.width, config.attention_width)
        self.key = nn.Linear(config.width, config.attention_width)
        self.score = nn.Linear(config.attention_width, 1, bias=False)

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """Contexts [B, T, D] for queries [B, T, A] over keys [B, S, A] and values [B, S, D].

        Args:
            mask: bool [T, S], true where a query may look; None: everywhere.
        """
        scores = self.score(torch.tanh(query.unsqueeze(2) + keys.unsqueeze(1))).squeeze(
            -1
        )  # (B, T, S)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        return torch.softmax(scores.float(), dim=-1).to(values.dtype) @ values

    def hidden(self, features: Features, tokens: Tensor) -> Tensor:
        image = for_captions(self.project(features), len(tokens))
        outputs = self.read(image, tokens)  # (B, 1 + T, D), the image's own output first
        words, positions = tokens.shape[1], outputs.shape[1]
        causal = torch.ones(words, positions, dtype=torch.bool, device=tokens.device).tril(1)
        context = self.attend(self.query(outputs[:, 1:]), self.key(outputs), outputs, causal)
        return self.merge(image.unsqueeze(1), context)

    def start(self, features: Features) -> State:
        state = super().start(features)
        outputs = state["hidden"].unsqueeze(1)
        return state | {"keys": self.key(outputs), "outputs": outputs}

    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State, Tensor | None]:
        state = self.read_one(tokens, state)
        output = state["hidden"].unsqueeze(1)
        state["keys"] = torch.cat([state["keys"], self.key(output)], dim=1)
        state["outputs"] = torch.cat([state["outputs"], output], dim=1)
        context = self.attend(self.query(output), state["keys"], state["outputs"], None)[:, 0]
        return self.output(self.merge(state["image"], context)), state, None
