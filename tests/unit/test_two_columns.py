"""A decoder may read the pooled vector and the grid, which may differ in width and scale."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from captioner.artifacts.feature_store import FeatureStore
from captioner.config import DecodeConfig, TrainConfig
from captioner.decoders.base import Decoder, Features, Standardize, State, for_captions
from captioner.decoders.ensemble import Ensemble
from captioner.decoding.beam import search
from captioner.encoders.spec import FeatureShape
from captioner.text import Vocabulary, clean
from captioner.training.ingest import Ingest, fit_standardize, open_split
from captioner.training.steps import TeacherForcing, build_optimizer, train_step
from tests.stores import ANIMALS, CHANNELS, write_store

SHAPE = FeatureShape(CHANNELS, CHANNELS, 7, 7)


class Both(Decoder):
    """A recurrent network that begins with the pooled vector and looks at the mean of the grid at every word."""

    columns = ("pooled", "grid")
    attends = False
    image_state = frozenset({"cells"})

    def __init__(self, vocabulary_size: int, width: int = 24):
        super().__init__()
        self.pooled, self.grid = Standardize("pooled", SHAPE), Standardize("grid", SHAPE)
        self.image = nn.Linear(SHAPE.pooled_channels, width)
        self.cells = nn.Linear(SHAPE.grid_channels, width)
        self.embedding = nn.Embedding(vocabulary_size, width)
        self.cell = nn.GRUCell(width, width)
        self.output = nn.Linear(width, vocabulary_size)

    def start(self, features: Features) -> State:
        cells = self.cells(self.grid(features)).mean(dim=1)
        return {"cells": cells, "hidden": torch.tanh(self.image(self.pooled(features)))}

    def read(self, tokens: Tensor, state: State) -> State:
        words = self.embedding(tokens) + for_captions(state["cells"], len(tokens))
        return state | {"hidden": self.cell(words, state["hidden"])}

    def hidden(self, features: Features, tokens: Tensor) -> Tensor:
        state = self.start(features)
        state["hidden"] = for_captions(state["hidden"], len(tokens))
        outputs = []
        for words in tokens.unbind(dim=1):
            state = self.read(words, state)
            outputs.append(state["hidden"])
        return torch.stack(outputs, dim=1)

    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State, Tensor | None]:
        state = self.read(tokens, state)
        return self.output(state["hidden"]), state, None


@pytest.fixture(params=["resident", "streaming"])
def opened(
    tmp_path: Path, request: pytest.FixtureRequest
) -> Callable[[str], tuple[Ingest, Vocabulary]]:
    store = FeatureStore.open(
        write_store(tmp_path / "store", {"train": 24, "validation": 6}, grid=True, crops=1)
    )
    texts = store.captions("train").values()
    vocabulary = Vocabulary.build([clean(text) for captions in texts for text in captions])
    config = TrainConfig(
        features=store.uri, output="unused", global_batch=16, ingest=request.param, crops=1
    )

    def open_(split: str) -> tuple[Ingest, Vocabulary]:
        way = open_split(
            store, split, Both.columns, vocabulary, config, rank=0, workers=1, memory=2**40,
        )  # fmt: skip
        return way, vocabulary

    return open_


def test_a_decoder_of_both_columns_is_trained_and_searched(
    opened: Callable[[str], tuple[Ingest, Vocabulary]],
) -> None:
    split, vocabulary = opened("train")
    torch.manual_seed(0)
    decoder = Both(len(vocabulary))
    fit_standardize(decoder, split, whole=False)
    config = TrainConfig(features="unused", output="unused")
    model, optimizer = TeacherForcing(decoder).train(), build_optimizer(config.optimizer, decoder)
    for epoch in range(40):
        for step, batch in enumerate(split.epoch(epoch)):
            assert batch.features.keys() == {"pooled", "grid"}
            # Both are those of one view of the picture.
            torch.testing.assert_close(
                batch.features["grid"].mean(dim=1), batch.features["pooled"], atol=1e-2, rtol=0
            )
            train_step(
                model, optimizer, batch, seed=(epoch, step), workers=1, config=config, compute="float32"
            )  # fmt: skip
    validation, _ = opened("validation")
    (batch,) = validation.ordered(images=6)
    rows = validation.data.image_rows[batch.captions[:, 0]]
    for one in (decoder.eval(), Ensemble([decoder, decoder]).eval()):
        found = search(one, batch.features, DecodeConfig(beam_size=3))
        animals = [vocabulary.decode(list(best.tokens)).split()[1] for best, *_ in found]
        assert animals == [ANIMALS[row] for row in rows]
        assert found[0][0].attention is None


def test_each_column_is_standardised_by_its_own_statistics(
    opened: Callable[[str], tuple[Ingest, Vocabulary]],
) -> None:
    split, vocabulary = opened("train")
    asked = []

    class Scaled:
        """The split as if the grid were a thousand times as large."""

        def statistics(self, column: str) -> tuple[Tensor, Tensor]:
            asked.append(column)
            factor = 1000 if column == "grid" else 1
            mean, deviation = split.statistics(column)
            return factor * mean, factor * deviation

    decoder = Both(len(vocabulary))
    fit_standardize(Ensemble([decoder, Both(len(vocabulary))]), Scaled(), whole=False)
    assert sorted(asked) == ["grid", "pooled"]
    torch.testing.assert_close(decoder.grid.scale, 1000 * decoder.pooled.scale, rtol=1e-2, atol=0)
    torch.testing.assert_close(decoder.grid.mean, 1000 * decoder.pooled.mean, rtol=1e-2, atol=1)
