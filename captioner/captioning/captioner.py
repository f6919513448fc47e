"""The Captioner: image bytes -> captions. Evaluation, the captioning job and the service all call it."""

import base64
import html
import io
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from PIL import Image

from captioner import storage
from captioner.artifacts.model_directory import (
    LoadedModel,
    ModelDirectory,
    check_search,
    load_model,
)
from captioner.artifacts.models import Model, open_any
from captioner.artifacts.transformers_folder import TransformersFolder
from captioner.config import DecodeConfig, ImageLimits
from captioner.decoders.base import Features
from captioner.decoding.beam import Hypothesis, search
from captioner.decoding.mbr import search_mbr
from captioner.encoders.encoder import Encoder
from captioner.encoders.weights import ENCODER_WEIGHTS
from captioner.errors import ImageError
from captioner.images.load import Fit, Pixels, load_image
from captioner.runtime.device import choose_device

# Encoding and decoding run in pieces of this many images, so that memory does not grow with the caller's list.
PIECE = 64


@dataclass(frozen=True)
class Candidate:
    """One caption for an image."""

    text: str
    words: tuple[str, ...]
    """Its words, one for each grid of ``attention``."""
    log_prob: float
    """Natural logarithm of its probability, summed over the words and <end>."""
    attention: np.ndarray[Any, np.dtype[np.float32]] | None
    """float32 [words, rows, columns] over the encoder's grid; None where the decoder does not attend."""


@dataclass(frozen=True)
class Seen:
    """An encoded image, and how an encoder sees it."""

    data: bytes
    fit: Fit
    limits: ImageLimits | None

    def thumbnail(self) -> bytes:
        """A JPEG of at most 240 pixels a side."""
        made = load_image(self.data, self.fit, self.limits, thumbnail=True).thumbnail
        assert made is not None
        return made


@dataclass(frozen=True)
class Caption:
    """The candidates for one image, best first."""

    candidates: tuple[Candidate, ...]
    seen: Seen | None = field(default=None, repr=False, compare=False)
    """What it is of; None where the Captioner was given pixels or features."""

    def __str__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        """What notebooks show: picture, caption and alternatives, and where the decoder looked."""
        lines = "".join(
            f"<div>{html.escape(one.text)} <small>{math.exp(one.log_prob):.1%}</small></div>"
            for one in self.candidates
        )
        if self.seen is None:
            return lines
        shown, kind = self.seen.thumbnail(), "jpeg"
        if self.attention is not None and self.words:
            # Here, for it takes matplotlib with it, which no worker needs.
            from captioner.plots.attention import attention_maps

            with Image.open(io.BytesIO(shown)) as small:
                box = self.seen.fit.box(*small.size)
            shown, kind = attention_maps(shown, self.words, self.attention, box), "png"
        data = base64.b64encode(shown).decode()
        return f'<img src="data:image/{kind};base64,{data}" alt="">{lines}'

    @property
    def text(self) -> str:
        return self.candidates[0].text

    @property
    def words(self) -> tuple[str, ...]:
        return self.candidates[0].words

    @property
    def log_prob(self) -> float:
        return self.candidates[0].log_prob

    @property
    def attention(self) -> np.ndarray[Any, np.dtype[np.float32]] | None:
        return self.candidates[0].attention

    @property
    def alternatives(self) -> tuple[Candidate, ...]:
        return self.candidates[1:]


Encoded = TypeVar("Encoded")
"""What a model makes of loaded images before it searches for their captions."""


class Captioner(ABC, Generic[Encoded]):
    """A model ready to caption, on one device. An image's caption does not depend on what else is in its batch."""

    opened: Model
    """What it is, as it was opened."""
    device: torch.device

    @staticmethod
    def load(uri: str, device: str | None = None) -> "Captioner[Any]":
        """Load a model directory; everything it needs is in it. Or a captioning model of ``transformers``.

        Args:
            uri: of its directory, or ``hf:org/name[@revision]``.
            device: ``cpu``, ``cuda`` ...; default: a GPU where there is one.

        Raises:
            ModelError: the directory is incomplete or its parts do not agree.
        """
        device = device or choose_device()
        opened = open_any(uri)
        if isinstance(opened, TransformersFolder):
            # Here, for only who has such a model has transformers.
            from captioner.captioning.transformers import TransformersCaptioner

            return TransformersCaptioner(opened, device)
        return DecoderCaptioner.open(opened.uri, device)

    def caption(
        self,
        images: Sequence[bytes | str | Path],
        decode: DecodeConfig | None = None,
        limits: ImageLimits | None = None,
    ) -> list[Caption]:
        """Caption encoded images (JPEG, PNG ...).

        Args:
            images: their bytes, or the paths or URIs of files.
            decode: the search; default: the model's own.

        Raises:
            ImageError: one of them is not an image that is accepted; the message says which.
            StoreError: a file cannot be read.
        """
        fit = self.opened.fit
        files = [
            image if isinstance(image, bytes) else storage.read_bytes(str(image))
            for image in images
        ]
        pixels = []
        for position, data in enumerate(files):
            try:
                pixels.append(load_image(data, fit, limits).pixels)
            except ImageError as error:
                if len(files) == 1:
                    raise
                raise type(error)(f"image {position + 1} of {len(files)}: {error}") from error
        found = self.caption_pixels(pixels, decode)
        return [
            replace(caption, seen=Seen(data, fit, limits))
            for caption, data in zip(found, files, strict=True)
        ]

    def caption_pixels(
        self, images: Sequence[Pixels] | Pixels, decode: DecodeConfig | None = None
    ) -> list[Caption]:
        """Caption loaded images, uint8 RGB [rows, columns, 3] each, as the model's ``fit`` makes them."""
        captions = []
        for start in range(0, len(images), PIECE):
            encoded = self.encode(images[start : start + PIECE])
            captions += self.caption_features(encoded, decode)
        return captions

    def get_ready(self) -> None:
        """Load what would be loaded for the first picture."""

    @abstractmethod
    def encode(self, images: Sequence[Pixels] | Pixels) -> Encoded:
        """What the search needs of loaded images, whatever it looks for."""

    @abstractmethod
    def choose(self, encoded: Encoded, places: list[int]) -> Encoded:
        """That of some of them."""

    @abstractmethod
    def caption_features(
        self, encoded: Encoded, decode: DecodeConfig | None = None
    ) -> list[Caption]:
        """Caption encoded images.

        Raises:
            ConfigError: as ``check``.
        """

    @abstractmethod
    def check(self, decode: DecodeConfig) -> None:
        """
        Raises:
            ConfigError: the model cannot be searched like that; the setting is named.
        """

    @abstractmethod
    def on_step(self, act: Callable[[], None]) -> None:
        """Call ``act`` at every step of every search; what it raises ends the search."""


def load_whole(uri: str) -> Model:
    """Open a model, all of whose parts are there and agree.

    Raises:
        ModelError: they do not.
        OutOfReachError: the hub cannot be reached.
    """
    opened = Captioner.load(uri, "cpu").opened
    if isinstance(opened, ModelDirectory):
        opened.read(ENCODER_WEIGHTS)
    return opened


class DecoderCaptioner(Captioner[Features]):
    """A model of this package: an encoder, a decoder, and the search."""

    opened: ModelDirectory

    def __init__(self, model: LoadedModel, device: str):
        self.model, self.opened = model, model.directory
        self.device = torch.device(device)

    @classmethod
    def open(cls, uri: str, device: str) -> "DecoderCaptioner":
        """From a model directory.

        Raises:
            ModelError: it is incomplete or its parts do not agree.
        """
        model = load_model(uri)
        model.decoder.to(device)
        return cls(model, device)

    @cached_property
    def encoder(self) -> Encoder:
        """The image network; loaded when the first image comes, as who brings features needs none."""
        directory = self.model.directory
        spec = directory.record.encoder.spec
        return Encoder.load(directory.encoder_weights_uri, spec, str(self.device))

    def encode(self, images: Sequence[Pixels] | Pixels) -> Features:
        """Features of loaded images, those that the model reads: ``pooled`` [B, C], ``grid`` [B, P, D]."""
        columns = self.model.decoder.columns
        pooled, grid = self.encoder(np.asarray(images), grid="grid" in columns)
        found = {"pooled": pooled, "grid": grid}
        # The store keeps grids in float16; the decoder computes in float32.
        return {name: found[name].float() for name in columns}  # type: ignore[union-attr]

    def get_ready(self) -> None:
        self.encoder  # noqa: B018

    def choose(self, encoded: Features, places: list[int]) -> Features:
        return {name: column[places] for name, column in encoded.items()}

    def check(self, decode: DecodeConfig) -> None:
        check_search(decode, self.model.vocabulary, ngrams=self.model.ngrams is not None)

    def on_step(self, act: Callable[[], None]) -> None:
        for module in self.model.decoder.modules():
            # Every step of a search ends in it.
            if isinstance(output := getattr(module, "output", None), torch.nn.Module):
                output.register_forward_pre_hook(lambda *_: act())

    def caption_features(
        self, encoded: Features, decode: DecodeConfig | None = None
    ) -> list[Caption]:
        """Caption images given by their features (float32, on any device).

        Raises:
            ConfigError: as ``check_search``.
        """
        features = {name: tensor.to(self.device) for name, tensor in encoded.items()}
        decode = decode or self.model.record.decode
        decoder, ngrams = self.model.decoder, self.model.ngrams
        constraint = check_search(decode, self.model.vocabulary, ngrams=ngrams is not None)
        if decode.mbr_samples and ngrams is not None:
            found = search_mbr(decoder, features, decode, ngrams, constraint)
        else:
            found = search(decoder, features, decode, constraint)
        return [Caption(tuple(self._candidate(one) for one in image)) for image in found]

    def _candidate(self, hypothesis: Hypothesis) -> Candidate:
        attention = hypothesis.attention
        if attention is not None:
            rows, columns = self.model.record.encoder.spec.grid
            attention = attention.reshape(-1, rows, columns)
        vocabulary = self.model.vocabulary
        return Candidate(
            vocabulary.decode(hypothesis.tokens),
            tuple(vocabulary.words[token] for token in hypothesis.tokens),
            hypothesis.log_prob,
            None if attention is None else attention.cpu().numpy(),
        )
