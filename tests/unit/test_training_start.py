"""Starting from a model: words that it knows keep their weights, settings are taken over or refused."""

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from captioner.artifacts.feature_store import FeatureStore
from captioner.artifacts.manifests import EncoderRecord
from captioner.artifacts.model_directory import load_model
from captioner.config import (
    DECODER_KINDS,
    DecodeConfig,
    DecoderConfig,
    DecoderKind,
    TextConfig,
    TrainConfig,
)
from captioner.decoders import build_decoder
from captioner.errors import ConfigError
from captioner.text import Vocabulary
from captioner.training.start import load_weights, with_settings_of
from tests.models import publish_model
from tests.stores import encoder_spec, write_store

THERE = Vocabulary.build([("cat", "cat", "dog", "runs")])
NEW = Vocabulary.build([("runs", "runs", "a", "horse", "cat")])


def model(root: Path, kind: DecoderKind, members: int = 1) -> str:
    config = DecoderConfig(
        kind=kind, width=16, output_width=16, layers=1, heads=4, ensemble_size=members,
        tie_embeddings=kind == "transformer",
    )  # fmt: skip
    torch.manual_seed(1)
    spec = encoder_spec()
    decoder = build_decoder(config, len(THERE), spec.shape)
    record = EncoderRecord(spec=spec, weights="random(seed=0)")
    return publish_model(root, decoder, config, THERE, encoder=(record, b""))


@pytest.mark.parametrize("members", [1, 2])
@pytest.mark.parametrize("kind", DECODER_KINDS)
def test_known_words_keep_their_rows(tmp_path: Path, kind: DecoderKind, members: int) -> None:
    uri = model(tmp_path / "model", kind, members)
    there = load_model(uri)
    torch.manual_seed(2)
    decoder = build_decoder(there.record.decoder, len(NEW), encoder_spec().shape)
    fresh = {name: value.clone() for name, value in decoder.state_dict().items()}
    load_weights(decoder, uri, NEW, encoder_spec().shape)
    by_word = 0
    for name, value in decoder.state_dict().items():
        old = there.decoder.state_dict()[name]
        if value.shape == old.shape:
            assert torch.equal(value, old)
            continue
        by_word += 1
        for row, word in enumerate(NEW.words):
            if word in THERE.words:
                assert torch.equal(value[row], old[THERE.words.index(word)])
            else:
                assert torch.equal(value[row], fresh[name][row])
    # Embedding and output layer, and its bias.
    assert by_word == 3 * members
    assert {"a", "horse"} == {word for word in NEW.words if word not in THERE.words}


def settings(**changes: object) -> TrainConfig:
    return TrainConfig.model_validate({"features": "f", "output": "o", "init": "m"} | changes)


def test_settings_are_the_models_where_none_are_given(tmp_path: Path) -> None:
    there = load_model(model(tmp_path / "model", "merge"))
    store = FeatureStore.open(write_store(tmp_path / "store", {"train": 2})).manifest
    taken = with_settings_of(settings(), there, store)
    assert taken.decoder == there.record.decoder
    assert taken.init == there.directory.uri
    own = there.record.decoder.model_copy(update={"dropout": 0.1})
    given = settings(decoder=own, text=TextConfig(min_count=7), decode=DecodeConfig(beam_size=9))
    kept = with_settings_of(given, there, store)
    assert (kept.decoder, kept.text.min_count, kept.decode.beam_size) == (own, 7, 9)
    with pytest.raises(ConfigError, match=r"decoder: init has another: width: 16 there, 32 asked"):
        with_settings_of(settings(decoder=own.model_copy(update={"width": 32})), there, store)


def test_drawn_captions_want_a_model_to_start_from() -> None:
    with pytest.raises(ValidationError, match="self_critical starts from a model; give init"):
        settings(objective="self_critical", init=None)
    assert settings(objective="self_critical").scores_captions
