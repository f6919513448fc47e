"""The model directory: everything needed to caption, in files that hold no code."""

import hashlib
from dataclasses import dataclass
from typing import Any

import safetensors
import safetensors.torch
from pydantic import ValidationError
from torch import Tensor, nn

from captioner import storage
from captioner.artifacts.feature_store import ENCODER_WEIGHTS, FeatureStore
from captioner.artifacts.output import MANIFEST, Output
from captioner.artifacts.schema import SCHEMA_VERSION, EncoderIdentity, Record, StoreManifest
from captioner.config import DecodeConfig, DecoderConfig, TextConfig
from captioner.decoders import build_decoder
from captioner.decoders.base import Decoder
from captioner.decoding.cider import NGramFrequencies
from captioner.errors import ModelError
from captioner.text import Vocabulary

CONFIG, VOCABULARY, WEIGHTS = "config.json", "vocab.json", "weights.safetensors"
NGRAMS = "ngrams.safetensors"


class ModelRecord(Record):
    """``config.json``: how to rebuild the decoder, and which features it reads."""

    schema_version: int = SCHEMA_VERSION
    decoder: DecoderConfig
    text: TextConfig
    encoder: EncoderIdentity
    columns: tuple[str, ...]
    """Feature columns it reads."""
    decode: DecodeConfig = DecodeConfig()
    """The search for its captions where nothing else is asked for."""
    vocabulary_size: int
    parameters: int
    """Trainable parameters of the decoder."""
    weights_sha256: str
    """SHA-256 of ``weights.safetensors``."""
    ngrams_sha256: str
    """SHA-256 of ``ngrams.safetensors``."""
    training: dict[str, Any]
    """The training configuration, for the record."""


class ModelManifest(Record):
    """``manifest.json`` of a model directory."""

    kind: str = "model"
    schema_version: int = SCHEMA_VERSION
    weights_sha256: str
    files: list[str]


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to use: the decoder in evaluation mode, on the CPU."""

    uri: str
    record: ModelRecord
    vocabulary: Vocabulary
    decoder: Decoder
    ngrams: NGramFrequencies
    """Of a sample of the images it was trained on."""

    @property
    def encoder_weights_uri(self) -> str:
        return storage.join(self.uri, ENCODER_WEIGHTS)


def pack_weights(decoder: nn.Module) -> bytes:
    """All parameters and buffers of a decoder as safetensors."""
    # Tied tensors share memory, which the format refuses; a copy each is small and loads back tied.
    return safetensors.torch.save(
        {
            name: tensor.detach().cpu().clone().contiguous()
            for name, tensor in decoder.state_dict().items()
        }
    )


def unpack_weights(decoder: nn.Module, data: bytes, name: str = WEIGHTS) -> None:
    """Load what ``pack_weights`` made.

    Raises:
        ModelError: names or shapes differ; the first difference is named.
    """
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load(data)
    except (safetensors.SafetensorError, KeyError) as error:  # KeyError: a dtype unknown to torch
        raise ModelError(f"{name} is not a safetensors file: {error}") from error
    wanted = decoder.state_dict()
    for key in sorted(wanted.keys() | tensors.keys()):
        there, expected = tensors.get(key), wanted.get(key)
        if there is None or expected is None or there.shape != expected.shape:
            raise ModelError(
                f"{name} does not fit its configuration: {key} is "
                f"{'missing' if there is None else tuple(there.shape)}, expected "
                f"{'nothing' if expected is None else tuple(expected.shape)}"
            )
    decoder.load_state_dict(tensors)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def save_model(
    output: Output,
    *,
    weights: bytes,
    vocabulary: Vocabulary,
    ngrams: NGramFrequencies,
    decoder: DecoderConfig,
    text: TextConfig,
    decode: DecodeConfig,
    store: FeatureStore,
    training: dict[str, Any],
) -> ModelRecord:
    """Write what ``load_model`` reads, the manifest excepted, which the caller publishes last.

    Args:
        weights: the decoder's, from ``pack_weights``.
        ngrams: of a sample of the train split, ``<end>`` included.
        decode: the search for its captions where nothing else is asked for.
        store: the features it was trained on; their encoder's weights are copied from it.
        training: the training configuration, for the record.
    """
    network = build_decoder(decoder, len(vocabulary), store.manifest.encoder.shape)
    table = ngrams.pack()
    record = ModelRecord(
        decoder=decoder,
        text=text,
        encoder=store.manifest.encoder,
        columns=network.columns,
        decode=decode,
        vocabulary_size=len(vocabulary),
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        weights_sha256=sha256(weights),
        ngrams_sha256=sha256(table),
        training=training,
    )
    storage.copy_file(store.encoder_weights_uri, output.uri(ENCODER_WEIGHTS))
    storage.write_bytes(output.uri(WEIGHTS), weights)
    storage.write_bytes(output.uri(VOCABULARY), vocabulary.save_json().encode())
    storage.write_bytes(output.uri(NGRAMS), table)
    storage.write_bytes(output.uri(CONFIG), record.model_dump_json(indent=1).encode())
    return record


def load_record(uri: str) -> ModelRecord:
    """The description of a published model.

    Raises:
        ModelError: the directory holds no published model, or one this release cannot read.
    """
    uri = storage.absolute(uri)
    manifest = storage.join(uri, MANIFEST)
    if not storage.exists(manifest):
        raise ModelError(f"{uri} is not a model directory: it has no {MANIFEST}")
    if storage.read_json(manifest).get("kind") != "model":
        raise ModelError(f"{uri} is not a model directory")
    raw = storage.read_json(storage.join(uri, CONFIG))
    if raw.get("schema_version") != SCHEMA_VERSION:
        raise ModelError(
            f"{uri} has schema version {raw.get('schema_version')}, this release reads {SCHEMA_VERSION}"
        )
    try:
        return ModelRecord.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ModelError(
            f"{uri}/{CONFIG} is damaged, or of another release: {where}: {first['msg']}"
        ) from error


def load_model(uri: str) -> LoadedModel:
    """Load a published model and check that its parts agree.

    Raises:
        ModelError: configuration, vocabulary and weights do not fit each other.
    """
    uri = storage.absolute(uri)
    record = load_record(uri)
    vocabulary = Vocabulary.from_json(storage.read_bytes(storage.join(uri, VOCABULARY)))
    if len(vocabulary) != record.vocabulary_size:
        raise ModelError(
            f"{uri}: {VOCABULARY} has {len(vocabulary)} entries, the decoder {record.vocabulary_size}"
        )
    weights = storage.read_bytes(storage.join(uri, WEIGHTS))
    decoder = build_decoder(record.decoder, record.vocabulary_size, record.encoder.shape)
    unpack_weights(decoder, weights, storage.join(uri, WEIGHTS))
    for name in (ENCODER_WEIGHTS, NGRAMS):
        if not storage.exists(storage.join(uri, name)):
            raise ModelError(f"{uri}: {name} is missing")
    table = storage.read_bytes(storage.join(uri, NGRAMS))
    for name, data, digest in (
        (WEIGHTS, weights, record.weights_sha256),
        (NGRAMS, table, record.ngrams_sha256),
    ):
        if sha256(data) != digest:
            raise ModelError(f"{uri}: {name} is not the file that {CONFIG} describes")
    ngrams = NGramFrequencies.unpack(table, storage.join(uri, NGRAMS))
    return LoadedModel(uri, record, vocabulary, decoder.eval(), ngrams)


def check_features_fit(record: ModelRecord, manifest: StoreManifest) -> None:
    """Refuse features that the model was not trained on.

    Raises:
        ModelError: another encoder made them, or a column is missing; the difference is named.
    """
    # bfloat16 and float32 embeddings of one network agree; anything else does not.
    there = manifest.encoder.model_dump(exclude={"compute", "weights"})
    wanted = record.encoder.model_dump(exclude={"compute", "weights"})
    for field, value in wanted.items():
        if there[field] != value:
            raise ModelError(
                f"the model does not fit the features: encoder.{field} is {value!r} in the model, "
                f"{there[field]!r} in the store"
            )
    if "grid" in record.columns and not manifest.grid:
        raise ModelError(
            "the model does not fit the features: it reads the grid, the store has none"
        )
