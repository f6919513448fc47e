"""The Captioner: image bytes -> captions. Evaluation, the captioning job and the service all call it."""

import base64
import html
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from captioner import storage
from captioner.artifacts.model_directory import LoadedModel, check_search, load_model
from captioner.config import DecodeConfig, ImageLimits
from captioner.decoders.base import Features
from captioner.decoding.beam import Hypothesis, search
from captioner.decoding.mbr import search_mbr
from captioner.encoders.encoder import Encoder
from captioner.errors import ImageError
from captioner.images.load import Fit, load_image
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


class Captioner:
    """A model ready to caption, on one device. An image's caption does not depend on what else is in its batch."""

    def __init__(self, model: LoadedModel, device: str):
        self.model = model
        self.device = torch.device(device)

    @cached_property
    def encoder(self) -> Encoder:
        """The image network; loaded when the first image comes, as who brings features needs none."""
        directory = self.model.directory
        spec = directory.record.encoder.spec
        return Encoder.load(directory.encoder_weights_uri, spec, str(self.device))

    @classmethod
    def load(cls, uri: str, device: str | None = None) -> "Captioner":
        """Load a model directory; everything it needs is in it.

        Args:
            device: ``cpu``, ``cuda`` ...; default: a GPU where there is one.

        Raises:
            ModelError: the directory is incomplete or its parts do not agree.
        """
        device = device or choose_device()
        model = load_model(uri)
        model.decoder.to(device)
        return cls(model, device)

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
        fit = self.model.record.encoder.spec.fit
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
        found = self.caption_pixels(np.stack(pixels), decode) if pixels else []
        return [
            replace(caption, seen=Seen(data, fit, limits))
            for caption, data in zip(found, files, strict=True)
        ]

    def caption_pixels(
        self, images: np.ndarray[Any, np.dtype[np.uint8]], decode: DecodeConfig | None = None
    ) -> list[Caption]:
        """Caption loaded images, uint8 RGB [N, rows, columns, 3] of the encoder's input."""
        captions = []
        for start in range(0, len(images), PIECE):
            features = self.encode(images[start : start + PIECE])
            captions += self.caption_features(features, decode)
        return captions

    def encode(self, images: np.ndarray[Any, np.dtype[np.uint8]]) -> Features:
        """Features of loaded images, those that the model reads: ``pooled`` [B, C], ``grid`` [B, P, D]."""
        columns = self.model.decoder.columns
        pooled, grid = self.encoder(images, grid="grid" in columns)
        found = {"pooled": pooled, "grid": grid}
        # The store keeps grids in float16; the decoder computes in float32.
        return {name: found[name].float() for name in columns}  # type: ignore[union-attr]

    def caption_features(
        self, features: Features, decode: DecodeConfig | None = None
    ) -> list[Caption]:
        """Caption images given by their features (float32, on any device).

        Raises:
            ConfigError: as ``check_search``.
        """
        features = {name: tensor.to(self.device) for name, tensor in features.items()}
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
