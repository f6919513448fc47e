"""A model directory is whole and agrees with itself, or loading it is refused in one line."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from captioner import storage
from captioner.artifacts.feature_store import ENCODER_WEIGHTS, FeatureStore
from captioner.artifacts.model_directory import (
    CONFIG,
    NGRAMS,
    VOCABULARY,
    WEIGHTS,
    ModelManifest,
    check_features_fit,
    load_model,
    load_record,
    pack_weights,
    save_model,
    unpack_weights,
)
from captioner.artifacts.output import Output
from captioner.artifacts.schema import EncoderIdentity, StoreManifest
from captioner.captioning.captioner import Captioner
from captioner.config import DecodeConfig, DecoderConfig, TextConfig
from captioner.decoders import build_decoder
from captioner.decoding.cider import NGramFrequencies
from captioner.encoders.spec import FeatureShape
from captioner.errors import ModelError
from captioner.text import Vocabulary
from tests.stores import CHANNELS, encoder_identity, write_store

DECODER = DecoderConfig(width=8, output_width=8, dropout=0.5)
SHAPE = FeatureShape(CHANNELS, CHANNELS, 7, 7)
WORDS = Vocabulary.build([["a", "dog"], ["a", "cat"]])
SEARCH = DecodeConfig(beam_size=4, num_captions=3, max_length=5, no_repeat_ngram=2)
FREQUENT = NGramFrequencies(images=2, counts={(4,): 2})


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    return FeatureStore.open(write_store(tmp_path / "features", {"train": 2}))


@pytest.fixture
def model(tmp_path: Path, store: FeatureStore) -> Path:
    """A published model with random weights."""
    output = Output(str(tmp_path / "model"), {"job": "test"})
    torch.manual_seed(7)
    record = save_model(
        output,
        weights=pack_weights(build_decoder(DECODER, len(WORDS), SHAPE)),
        vocabulary=WORDS,
        ngrams=FREQUENT,
        decoder=DECODER,
        text=TextConfig(),
        decode=SEARCH,
        store=store,
        training={"epochs": 1},
    )
    manifest = ModelManifest(weights_sha256=record.weights_sha256, files=[WEIGHTS])
    output.publish(manifest.model_dump_json())
    return tmp_path / "model"


def edit_config(model: Path, **changes: object) -> None:
    raw = json.loads((model / CONFIG).read_text())
    (model / CONFIG).write_text(json.dumps(raw | changes))


def test_a_loaded_model_is_the_saved_one(model: Path) -> None:
    loaded = load_model(str(model))
    torch.manual_seed(7)
    expected = build_decoder(DECODER, len(WORDS), SHAPE).state_dict()
    torch.testing.assert_close(dict(loaded.decoder.state_dict()), dict(expected), rtol=0, atol=0)
    assert not loaded.decoder.training
    assert loaded.vocabulary == WORDS
    assert loaded.ngrams == FREQUENT
    assert loaded.record.decoder == DECODER
    assert loaded.record.decode == SEARCH
    assert loaded.record.columns == ("pooled",)
    assert loaded.record.parameters == sum(value.numel() for value in loaded.decoder.parameters())


def test_a_model_is_searched_as_it_was_trained_to_be(model: Path) -> None:
    captioner = Captioner.load(str(model), "cpu")
    features = {"pooled": torch.ones(1, CHANNELS)}
    (own,) = captioner.caption_features(features)
    (asked,) = captioner.caption_features(features, SEARCH)
    assert [one.text for one in own.candidates] == [one.text for one in asked.candidates]
    assert len(own.candidates) == 3


def test_model_needs_nothing_outside_its_directory(model: Path, tmp_path: Path) -> None:
    (tmp_path / "features").rename(tmp_path / "gone")
    moved = model.rename(tmp_path / "elsewhere")
    loaded = load_model(str(moved))
    weights = storage.read_bytes(loaded.encoder_weights_uri)
    assert weights == (tmp_path / "gone" / ENCODER_WEIGHTS).read_bytes()


def test_unpublished_directory_is_no_model(model: Path) -> None:
    (model / "manifest.json").unlink()
    with pytest.raises(ModelError, match="no manifest.json"):
        load_model(str(model))


def test_a_feature_store_is_no_model(store: FeatureStore) -> None:
    with pytest.raises(ModelError, match="not a model directory"):
        load_record(store.uri)


def test_unknown_schema_version_is_refused(model: Path) -> None:
    edit_config(model, schema_version=99)
    with pytest.raises(ModelError, match="schema version 99"):
        load_model(str(model))


def test_damaged_config_names_the_field(model: Path) -> None:
    edit_config(model, vocabulary_size="many")
    with pytest.raises(ModelError, match="vocabulary_size"):
        load_model(str(model))


def test_vocabulary_of_another_size_is_refused(model: Path) -> None:
    (model / VOCABULARY).write_text(Vocabulary.build([["a"]]).save_json())
    with pytest.raises(ModelError, match=r"5 entries, the decoder 7"):
        load_model(str(model))


def test_weights_of_another_width_name_the_tensor_and_both_shapes(model: Path) -> None:
    wider = build_decoder(DecoderConfig(width=16, output_width=8), len(WORDS), SHAPE)
    (model / WEIGHTS).write_bytes(pack_weights(wider))
    with pytest.raises(ModelError, match=r"dense\.weight is \(8, 16\), expected \(8, 8\)"):
        load_model(str(model))


@pytest.mark.parametrize("missing", [True, False])
def test_missing_and_foreign_tensors_are_named(missing: bool) -> None:
    decoder = build_decoder(DECODER, len(WORDS), SHAPE)
    tensors = safetensors.torch.load(pack_weights(decoder))
    tensors["foreign"] = torch.zeros(1)
    if missing:
        del tensors["foreign"], tensors["output.bias"]
    expected = "output.bias is missing" if missing else r"foreign is \(1,\), expected nothing"
    with pytest.raises(ModelError, match=expected):
        unpack_weights(decoder, safetensors.torch.save(tensors))


def test_weights_of_another_training_are_refused(model: Path) -> None:
    (model / WEIGHTS).write_bytes(pack_weights(build_decoder(DECODER, len(WORDS), SHAPE)))
    with pytest.raises(ModelError, match="not the file"):
        load_model(str(model))


@pytest.mark.parametrize("content", [b"", b"\x80\x04pickle", b"\xff" * 64])
def test_other_files_are_not_taken_for_weights(model: Path, content: bytes) -> None:
    (model / WEIGHTS).write_bytes(content)
    with pytest.raises(ModelError, match="not a safetensors file"):
        load_model(str(model))


@pytest.mark.parametrize("name", [ENCODER_WEIGHTS, NGRAMS])
def test_every_part_must_be_there(model: Path, name: str) -> None:
    (model / name).unlink()
    with pytest.raises(ModelError, match=f"{name} is missing"):
        load_model(str(model))


def with_encoder(manifest: StoreManifest, **changes: object) -> StoreManifest:
    identity = EncoderIdentity.model_validate(encoder_identity().model_dump() | changes)
    return manifest.model_copy(update={"encoder": identity})


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "resnet50_v1"},
        {"layer": "layer3"},
        {"weights_sha256": "1" * 64},
        {"preprocessing": "caffe"},
        {"channels": CHANNELS + 1},
    ],
)
def test_features_of_another_encoder_are_refused(
    model: Path, store: FeatureStore, changes: dict[str, object]
) -> None:
    record = load_record(str(model))
    check_features_fit(record, store.manifest)
    with pytest.raises(ModelError, match=f"encoder.{next(iter(changes))}"):
        check_features_fit(record, with_encoder(store.manifest, **changes))


def test_name_of_the_weights_and_arithmetic_may_differ(model: Path, store: FeatureStore) -> None:
    same = with_encoder(store.manifest, weights="renamed.safetensors", compute="bfloat16")
    check_features_fit(load_record(str(model)), same)


def test_a_decoder_of_the_grid_needs_a_grid(model: Path, store: FeatureStore) -> None:
    record = load_record(str(model)).model_copy(update={"columns": ("grid",)})
    with pytest.raises(ModelError, match="it reads the grid"):
        check_features_fit(record, store.manifest)
    check_features_fit(record, store.manifest.model_copy(update={"grid": True}))
