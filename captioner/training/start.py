"""Starting from a published model: what of its settings a training takes over, and its weights under new words."""

from typing import Any

import torch
from torch import Tensor

from captioner.artifacts.manifests import StoreManifest
from captioner.artifacts.model_directory import LoadedModel, check_features_fit, load_model
from captioner.artifacts.output import differences
from captioner.config import DecodeConfig, DecoderConfig, TextConfig, TrainConfig
from captioner.decoders import build_decoder
from captioner.decoders.base import Decoder
from captioner.encoders.spec import FeatureShape
from captioner.errors import ConfigError
from captioner.text import Vocabulary

# What a decoder may have otherwise than the model it starts from.
_FREE = {"dropout", "feature_dropout"}


def with_settings_of(config: TrainConfig, model: LoadedModel, store: StoreManifest) -> TrainConfig:
    """The configuration of a training that starts from a model: its decoder, text and search where none are given.

    Raises:
        ConfigError: a decoder of another shape is asked for.
        ModelError: the features are not those the model was trained on.
    """
    record = model.record
    check_features_fit(record, store)
    taken: dict[str, Any] = {"init": model.directory.uri}
    if config.decoder == DecoderConfig():
        taken["decoder"] = record.decoder
    elif different := differences(
        record.decoder.model_dump(exclude=_FREE), config.decoder.model_dump(exclude=_FREE)
    ):
        raise ConfigError(f"decoder: init has another: {'; '.join(different)}")
    if config.text == TextConfig():
        taken["text"] = record.text
    if config.decode == DecodeConfig():
        taken["decode"] = record.decode
    return config.model_copy(update=taken)


def load_weights(decoder: Decoder, uri: str, vocabulary: Vocabulary, shape: FeatureShape) -> None:
    """Give a decoder the weights of a model of its configuration; words that the model knows keep their rows, others
    keep those that the decoder has.

    Raises:
        ModelError: the model cannot be read.
    """
    model = load_model(uri)
    of_words = _by_word(model.record.decoder, shape)
    there = {word: row for row, word in enumerate(model.vocabulary.words)}
    known = [(row, there[word]) for row, word in enumerate(vocabulary.words) if word in there]
    new, old = (torch.tensor(rows) for rows in zip(*known, strict=True))
    own: dict[str, Tensor] = dict(decoder.state_dict())
    for name, value in model.decoder.state_dict().items():
        if name in of_words:
            own[name][new] = value[old].to(own[name].device)
        else:
            own[name].copy_(value)


def _by_word(config: DecoderConfig, shape: FeatureShape) -> set[str]:
    """Names of the weights with a row for each word: those that grow with the vocabulary."""
    with torch.device("meta"):
        small, large = (build_decoder(config, size, shape).state_dict() for size in (8, 9))
    return {name for name, value in small.items() if value.shape != large[name].shape}
