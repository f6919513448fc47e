"""A model directory is whole and agrees with itself, or loading it is refused in one line."""

import hashlib
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from captioner import storage
from captioner.artifacts.feature_store import FeatureStore
from captioner.artifacts.manifests import StoreManifest
from captioner.artifacts.model_directory import (
    CONFIG,
    NGRAMS,
    VOCABULARY,
    WEIGHTS,
    check_features_fit,
    load_model,
    open_model,
    pack_weights,
    unpack_weights,
)
from captioner.captioning.captioner import Captioner, DecoderCaptioner
from captioner.config import DecodeConfig, DecodeOverrides, DecoderConfig
from captioner.decoders import build_decoder
from captioner.decoding.cider import NGramFrequencies
from captioner.encoders.weights import ENCODER_WEIGHTS
from captioner.errors import ConfigError, ModelError
from captioner.text import Vocabulary
from tests.models import encoder_of, publish_model
from tests.stores import encoder_spec, write_store

DECODER = DecoderConfig(width=8, output_width=8, dropout=0.5)
SHAPE = encoder_spec().shape
WORDS = Vocabulary.build([["a", "dog"], ["a", "cat"]])
SEARCH = DecodeConfig(beam_size=4, num_captions=3, max_length=5, no_repeat_ngram=2)
FREQUENT = NGramFrequencies(images=2, counts={(4,): 2})


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    return FeatureStore.open(write_store(tmp_path / "features", {"train": 2}))


@pytest.fixture
def model(tmp_path: Path, store: FeatureStore) -> Path:
    """A published model with random weights."""
    torch.manual_seed(7)
    decoder = build_decoder(DECODER, len(WORDS), SHAPE)
    publish_model(
        tmp_path / "model", decoder, DECODER, WORDS, encoder=encoder_of(store), ngrams=FREQUENT, decode=SEARCH
    )  # fmt: skip
    return tmp_path / "model"


def replace(model: Path, name: str, data: bytes) -> None:
    """Another file in a manifest that knows it: what is left to check is whether the parts agree."""
    (model / name).write_bytes(data)
    manifest = json.loads((model / "manifest.json").read_text())
    for entry in manifest["files"]:
        if entry["path"] == name:
            entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (model / "manifest.json").write_text(json.dumps(manifest))


def edit_config(model: Path, **changes: object) -> None:
    raw = json.loads((model / CONFIG).read_text())
    replace(model, CONFIG, json.dumps(raw | changes).encode())


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
    features = {"pooled": torch.ones(1, SHAPE.pooled_channels)}
    (own,) = captioner.caption_features(features)
    (asked,) = captioner.caption_features(features, SEARCH)
    assert [one.text for one in own.candidates] == [one.text for one in asked.candidates]
    assert len(own.candidates) == 3


def test_model_needs_nothing_outside_its_directory(model: Path, tmp_path: Path) -> None:
    (tmp_path / "features").rename(tmp_path / "gone")
    moved = model.rename(tmp_path / "elsewhere")
    loaded = load_model(str(moved))
    weights = storage.read_bytes(loaded.directory.encoder_weights_uri)
    assert weights == (tmp_path / "gone" / ENCODER_WEIGHTS).read_bytes()


def test_unpublished_directory_is_no_model(model: Path) -> None:
    (model / "manifest.json").unlink()
    with pytest.raises(ModelError, match="no manifest.json"):
        load_model(str(model))


def test_a_feature_store_is_no_model(store: FeatureStore) -> None:
    with pytest.raises(ModelError, match="not a model directory"):
        open_model(store.uri)


def test_model_of_another_release_is_refused(model: Path) -> None:
    manifest = json.loads((model / "manifest.json").read_text())
    (model / "manifest.json").write_text(json.dumps(manifest | {"schema_version": 1}))
    with pytest.raises(ModelError, match="written by an older release: train again"):
        load_model(str(model))


def test_damaged_config_names_the_field(model: Path) -> None:
    edit_config(model, vocabulary_size="many")
    with pytest.raises(ModelError, match="vocabulary_size"):
        load_model(str(model))


def test_vocabulary_of_another_size_is_refused(model: Path) -> None:
    replace(model, VOCABULARY, Vocabulary.build([["a"]]).save_json().encode())
    with pytest.raises(ModelError, match=r"5 entries, the decoder 7"):
        load_model(str(model))


def test_weights_of_another_width_name_the_tensor_and_both_shapes(model: Path) -> None:
    wider = build_decoder(DecoderConfig(width=16, output_width=8), len(WORDS), SHAPE)
    replace(model, WEIGHTS, pack_weights(wider))
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


@pytest.mark.parametrize("name", [WEIGHTS, VOCABULARY, NGRAMS, CONFIG])
def test_a_flipped_bit_is_noticed(model: Path, name: str) -> None:
    data = bytearray((model / name).read_bytes())
    data[len(data) // 2] ^= 1
    (model / name).write_bytes(data)
    with pytest.raises(ModelError, match=r"is damaged|not JSON"):
        load_model(str(model))


def test_two_words_swapped_are_noticed(model: Path) -> None:
    text = (model / VOCABULARY).read_text()
    swapped = text.replace('"cat"', '"?"').replace('"dog"', '"cat"').replace('"?"', '"dog"')
    assert swapped != text
    (model / VOCABULARY).write_text(swapped)
    with pytest.raises(ModelError, match="is damaged"):
        load_model(str(model))


def test_a_search_with_n_grams_is_refused_of_a_model_without(
    model: Path, tmp_path: Path, store: FeatureStore
) -> None:
    asked = DecodeOverrides(mbr_samples=7)
    assert load_model(str(model)).directory.search(asked).mbr_samples == 7
    decoder = build_decoder(DECODER, len(WORDS), SHAPE)
    uri = publish_model(
        tmp_path / "plain", decoder, DECODER, WORDS, encoder=encoder_of(store), ngrams=None
    )
    assert not (tmp_path / "plain" / NGRAMS).exists()
    plain = load_model(uri)
    assert plain.ngrams is None
    assert plain.directory.search(DecodeOverrides(beam_size=2)).beam_size == 2
    refused = "mbr_samples: 7 asked of a model without n-grams .* train the model with --decode.mbr-samples"
    with pytest.raises(ConfigError, match=refused):
        plain.directory.search(asked)
    with pytest.raises(ConfigError, match=refused):
        DecoderCaptioner(plain, "cpu").caption_features(
            {"pooled": torch.zeros(1, SHAPE.pooled_channels)}, DecodeConfig(mbr_samples=7)
        )


@pytest.mark.parametrize("content", [b"", b"\x80\x04pickle", b"\xff" * 64])
def test_other_files_are_not_taken_for_weights(model: Path, content: bytes) -> None:
    replace(model, WEIGHTS, content)
    with pytest.raises(ModelError, match="not a safetensors file"):
        load_model(str(model))


@pytest.mark.parametrize("name", [ENCODER_WEIGHTS, NGRAMS, VOCABULARY])
def test_every_part_must_be_there(model: Path, name: str) -> None:
    (model / name).unlink()
    with pytest.raises(ModelError, match=name):
        load_model(str(model))


def with_encoder(manifest: StoreManifest, **changes: object) -> StoreManifest:
    spec = encoder_spec().model_copy(update=changes)
    encoder = manifest.encoder.model_copy(update={"spec": spec})
    return manifest.model_copy(update={"encoder": encoder})


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "resnet50_v1"},
        {"layer": "layer3"},
        {"weights_sha256": "1" * 64},
        {"resize": "crop"},
        {"filter": "bicubic"},
        {"mean": (1.0, 0.0, 0.0)},
        {"precision": "bfloat16"},
        {"input_size": (96, 96)},
    ],
)
def test_features_of_another_encoder_are_refused(
    model: Path, store: FeatureStore, changes: dict[str, object]
) -> None:
    record = open_model(str(model)).record
    check_features_fit(record, store.manifest)
    with pytest.raises(ModelError, match=f"encoder.{next(iter(changes))}"):
        check_features_fit(record, with_encoder(store.manifest, **changes))


def test_name_of_the_weights_and_runtime_may_differ(model: Path, store: FeatureStore) -> None:
    encoder = store.manifest.encoder
    renamed = encoder.model_copy(update={"weights": "renamed.safetensors", "runtime": "compiled"})
    same = store.manifest.model_copy(update={"encoder": renamed})
    check_features_fit(open_model(str(model)).record, same)


def test_a_decoder_of_the_grid_needs_a_grid(model: Path, store: FeatureStore) -> None:
    record = open_model(str(model)).record.model_copy(update={"columns": ("grid",)})
    with pytest.raises(ModelError, match="it reads the grid"):
        check_features_fit(record, store.manifest)
    check_features_fit(record, store.manifest.model_copy(update={"grid": True}))
