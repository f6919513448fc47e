"""The model directory: everything needed to caption, in files that hold no code."""

import hashlib
from dataclasses import dataclass
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor, nn

from captioner import storage
from captioner.artifacts import model_hub
from captioner.artifacts.manifests import (
    EncoderRecord,
    FileEntry,
    ModelManifest,
    Record,
    StoreManifest,
    open_manifest,
    parse_record,
)
from captioner.artifacts.output import Output, differences
from captioner.config import DecodeConfig, DecodeOverrides, DecoderConfig, TextConfig
from captioner.decoders import build_decoder
from captioner.decoders.base import Decoder
from captioner.decoding.cider import NGramFrequencies
from captioner.decoding.constraint import Constraint
from captioner.encoders.weights import ENCODER_WEIGHTS
from captioner.errors import ConfigError, ModelError, StoreError
from captioner.images.load import Fit
from captioner.text import Vocabulary

CONFIG, VOCABULARY, WEIGHTS = "config.json", "vocab.json", "weights.safetensors"
NGRAMS = "ngrams.safetensors"


class ModelRecord(Record):
    """``config.json``: how to rebuild the decoder, and which features it reads."""

    decoder: DecoderConfig
    text: TextConfig
    encoder: EncoderRecord
    columns: tuple[str, ...]
    """Feature columns it reads."""
    decode: DecodeConfig = DecodeConfig()
    """The search for its captions where nothing else is asked for, with all its constants."""
    vocabulary_size: int
    parameters: int
    """Trainable parameters of the decoder."""
    training: dict[str, Any]
    """The training configuration, for the record."""


@dataclass(frozen=True)
class ModelDirectory:
    """A published model, opened."""

    uri: str
    """What every machine knows it by."""
    root: str
    """Where its files are; of a model of the hub, in this machine's cache."""
    manifest: ModelManifest
    record: ModelRecord

    @property
    def version(self) -> str:
        """SHA-256 of the decoder's weights."""
        return str(self.entry(WEIGHTS).sha256)

    memory = None
    """Of no account."""

    @property
    def fit(self) -> Fit:
        """How a picture becomes what it sees."""
        return self.record.encoder.spec.fit

    @property
    def decode(self) -> DecodeConfig:
        """Its own search."""
        return self.record.decode

    @property
    def encoder_weights_uri(self) -> str:
        return storage.join(self.root, ENCODER_WEIGHTS)

    def search(self, asked: DecodeOverrides) -> DecodeConfig:
        """The model's own search, with what is asked for in its place.

        Raises:
            ConfigError: the model cannot be searched like that.
        """
        decode = asked.over(self.record.decode)
        vocabulary = Vocabulary.from_json(self.read(VOCABULARY))
        ngrams = any(entry.path == NGRAMS for entry in self.manifest.files)
        check_search(decode, vocabulary, ngrams=ngrams)
        return decode

    def entry(self, path: str) -> FileEntry:
        """What the manifest says of a file.

        Raises:
            ModelError: nothing.
        """
        for entry in self.manifest.files:
            if entry.path == path:
                return entry
        raise ModelError(f"{self.uri}: its manifest lists no {path}")

    def read(self, path: str) -> bytes:
        """A file, which must be the one that was published.

        Raises:
            ModelError: it is missing or another.
        """
        entry, place = self.entry(path), storage.join(self.root, path)
        try:
            data = storage.read_bytes(place)
        except StoreError as error:
            raise ModelError(str(error)) from error
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise ModelError(f"{place} is damaged: it is not the file that was published")
        return data


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to use: the decoder in evaluation mode, on the CPU."""

    directory: ModelDirectory
    vocabulary: Vocabulary
    decoder: Decoder
    ngrams: NGramFrequencies | None
    """Of a sample of the images it was trained on; None of a model that does not rank by them."""

    @property
    def record(self) -> ModelRecord:
        return self.directory.record


def check_search(decode: DecodeConfig, vocabulary: Vocabulary, *, ngrams: bool) -> Constraint:
    """What a search forces and forbids, in the words of the model.

    Args:
        ngrams: whether the model has them.

    Raises:
        ConfigError: the search ranks by n-grams, which the model does not have, or begins with words it does not know.
    """
    if decode.prompt:
        raise ConfigError(
            "decode.prompt: the model is no chat model, and is asked nothing; leave it out"
        )
    if decode.mbr_samples and not ngrams:
        raise ConfigError(
            f"decode.mbr_samples: {decode.mbr_samples} asked of a model without n-grams to rank captions by: "
            "leave it out, or train the model with --decode.mbr-samples"
        )
    return Constraint.of(decode, vocabulary)


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


def save_model(
    output: Output,
    *,
    weights: bytes,
    vocabulary: Vocabulary,
    ngrams: NGramFrequencies | None,
    decoder: DecoderConfig,
    text: TextConfig,
    decode: DecodeConfig,
    encoder: EncoderRecord,
    encoder_weights: bytes,
    training: dict[str, Any],
) -> list[FileEntry]:
    """Write what ``load_model`` reads, the manifest excepted, which the caller publishes last.

    Args:
        weights: the decoder's, from ``pack_weights``.
        ngrams: of a sample of the train split, ``<end>`` included; None where captions are not ranked by them.
        decode: the search for its captions where nothing else is asked for.
        encoder_weights: ``encoder.safetensors`` of the store that it was trained on.
        training: the training configuration, for the record.

    Returns:
        what was written.

    Raises:
        ModelError: the parts do not agree.
    """
    network = build_decoder(decoder, len(vocabulary), encoder.spec.shape)
    unpack_weights(network, weights)
    record = ModelRecord(
        decoder=decoder,
        text=text,
        encoder=encoder,
        columns=network.columns,
        decode=decode,
        vocabulary_size=len(vocabulary),
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        training=training,
    )
    return [
        output.write(ENCODER_WEIGHTS, encoder_weights),
        output.write(WEIGHTS, weights),
        output.write(VOCABULARY, vocabulary.save_json().encode()),
        *([] if ngrams is None else [output.write(NGRAMS, ngrams.pack())]),
        output.write(CONFIG, record.model_dump_json(indent=1).encode()),
    ]


def open_model(uri: str) -> ModelDirectory:
    """A published model's manifest and description.

    Args:
        uri: of its directory, or ``hf:org/name[@revision]`` on the hub.

    Raises:
        ModelError: the directory holds no published model, or one this release cannot read.
        OutOfReachError: the hub cannot be reached.
    """
    if uri.startswith(model_hub.PREFIX):
        uri, root = model_hub.fetch(uri)
    else:
        uri = root = storage.absolute(uri)
    manifest = open_manifest(root, ModelManifest, ModelError)
    place = storage.join(root, CONFIG)
    try:
        raw = storage.read_json(place)
    except StoreError as error:
        raise ModelError(str(error)) from error
    return ModelDirectory(uri, root, manifest, parse_record(place, raw, ModelRecord, ModelError))


def load_model(uri: str) -> LoadedModel:
    """Load a published model and check that its parts are those that were published, and agree.

    Raises:
        ModelError: a file is missing, damaged, or does not fit the others.
    """
    directory = open_model(uri)
    record = directory.record
    directory.read(CONFIG)
    vocabulary = Vocabulary.from_json(directory.read(VOCABULARY))
    if len(vocabulary) != record.vocabulary_size:
        raise ModelError(
            f"{uri}: {VOCABULARY} has {len(vocabulary)} entries, the decoder {record.vocabulary_size}"
        )
    decoder = build_decoder(record.decoder, record.vocabulary_size, record.encoder.spec.shape)
    unpack_weights(decoder, directory.read(WEIGHTS), storage.join(directory.root, WEIGHTS))
    ngrams = None
    if any(entry.path == NGRAMS for entry in directory.manifest.files):
        ngrams = NGramFrequencies.unpack(
            directory.read(NGRAMS), storage.join(directory.root, NGRAMS)
        )
    if not storage.exists(directory.encoder_weights_uri):
        raise ModelError(f"{uri}: {ENCODER_WEIGHTS} is missing")
    return LoadedModel(directory, vocabulary, decoder.eval(), ngrams)


def check_features_fit(record: ModelRecord, manifest: StoreManifest) -> None:
    """Refuse features that the model was not trained on.

    Raises:
        ModelError: another encoder made them, or a column is missing; the difference is named.
    """
    different = differences(
        manifest.encoder.spec.model_dump(mode="json"), record.encoder.spec.model_dump(mode="json")
    )
    if different:
        raise ModelError(
            f"the model does not fit the features: encoder.{'; encoder.'.join(different)} by the model"
        )
    if "grid" in record.columns and not manifest.grid:
        raise ModelError(
            "the model does not fit the features: it reads the grid, the store has none"
        )
