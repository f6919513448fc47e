"""One model's deployment: loads images on threads and batches them for the model, which runs on one of its own."""

import math
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from captioner.captioning.captioner import Candidate, Caption, Captioner
from captioner.config import DecodeConfig, ReplicaSettings
from captioner.errors import CaptionerError, ConfigError
from captioner.images.load import Loaded
from captioner.runtime.device import prepare_device
from captioner.serving import metrics
from captioner.serving.errors import ErrorCode, RequestError
from captioner.serving.loader import Loader
from captioner.serving.messages import (
    Alternative,
    CaptionResponse,
    ImageCaption,
    Timing,
    WordAttention,
)
from captioner.serving.queue import ModelQueue, Ran, Work

# Warm-up: a picture that exercises the whole path.
PROBE_DECODE = DecodeConfig(beam_size=1, max_length=5)
# A model that has made no step for so long is replaced; a batch makes one at every word.
_PATIENCE_S = 60.0


@dataclass(frozen=True)
class _Item:
    pixels: NDArray[np.uint8]
    decode: DecodeConfig


class CaptionModel:
    """A replica of one model. Ready once it has captioned a picture."""

    def __init__(self, name: str, uri: str, settings: ReplicaSettings, max_bytes: int):
        """
        Args:
            max_bytes: of images that it holds at once.
        """
        self._name = name
        self._captioner = Captioner.load(uri, prepare_device(threads=settings.threads))
        self._version = self._captioner.opened.version[:12]
        self._queue: ModelQueue[_Item, Caption] = ModelQueue(
            self._run,
            max_batch_size=settings.max_batch_size,
            max_requests=settings.max_queued,
            max_bytes=max_bytes,
            timeout_s=settings.request_timeout_s,
        )
        fit = self._captioner.opened.fit
        self._loader = Loader(fit, settings.limits, settings.max_loading_bytes)
        self._captioner.on_step(self._queue.step)
        self._warm_up(settings.max_batch_size)

    async def caption(
        self,
        images: list[bytes],
        names: list[str | None],
        decode: DecodeConfig,
        attention: bool,
        seconds: float,
    ) -> AsyncIterator[CaptionResponse | RequestError | None]:
        """Caption the images of one request within so many seconds.

        Yields:
            None once they are loaded; then the answer, or the error with which the request is refused.
        """
        try:
            self._captioner.check(decode)
        except ConfigError as error:
            yield RequestError(ErrorCode.BAD_PARAMETER, str(error))
            return
        started = time.monotonic()
        deadline = started + seconds
        one = Work(1, decode.work)
        work = Work(len(images), len(images) * decode.work)
        size = sum(map(len, images))
        ready_s = self._loader.seconds(len(images))
        try:
            with self._queue.admit(work, size, deadline, ready_s):
                good = await self._loader.load_all(images, names, deadline)
                ready = time.monotonic()
                yield None
                answers = await self._queue.submit(
                    [_Item(found.pixels, decode) for found in good], one, deadline
                )
        except RequestError as error:
            yield error
            return
        began = max(answer.began for answer in answers)
        metrics.observe(metrics.LOAD, self._name, ready - started)
        metrics.observe(metrics.QUEUE, self._name, max(0.0, began - ready))
        yield CaptionResponse(
            model=self._name,
            version=self._version,
            captions=[
                _message(answer.result, name, found, attention)
                for answer, name, found in zip(answers, names, good, strict=True)
            ],
            timing=Timing(
                load_ms=round(1e3 * (ready - started), 2),
                wait_ms=round(1e3 * max(0.0, began - ready), 2),
                model_ms=round(1e3 * (time.monotonic() - began), 2),
                batch_size=max(answer.batch_size for answer in answers),
            ),
        )

    async def health(self) -> str:
        """``ok``, or why this replica does not caption. It never waits for what the model works on."""
        return self._queue.trouble(_PATIENCE_S) or "ok"

    async def check_health(self) -> None:
        """Called by Ray Serve, which replaces a replica that raises or does not return."""
        if (trouble := self._queue.trouble(_PATIENCE_S)) is not None:
            raise CaptionerError(trouble)

    def _run(self, items: list[_Item]) -> Ran[Caption]:
        """One forward pass for all; the search once for each of the configurations asked for."""
        started = time.monotonic()
        features = self._captioner.encode([item.pixels for item in items])
        if self._captioner.device.type == "cuda":
            torch.cuda.synchronize()
        encoded = time.monotonic()
        found: list[Caption | None] = [None] * len(items)
        for decode in {item.decode for item in items}:
            places = [place for place, item in enumerate(items) if item.decode == decode]
            chosen = self._captioner.choose(features, places)
            for place, caption in zip(
                places, self._captioner.caption_features(chosen, decode), strict=True
            ):
                found[place] = caption
        captions = [caption for caption in found if caption is not None]
        ran = Ran(captions, encoded - started, time.monotonic() - encoded)
        metrics.observe(metrics.BATCH_SIZE, self._name, len(items))
        metrics.observe(metrics.ENCODER, self._name, ran.encoder_s)
        metrics.observe(metrics.DECODER, self._name, ran.decoder_s)
        return ran

    def _warm_up(self, max_batch_size: int) -> None:
        """Memory and kernels of both extremes, and the pace of the usual search."""
        found = self._loader.load(_picture(), time.monotonic() + _PATIENCE_S)
        if isinstance(found, RequestError):
            raise CaptionerError(str(found))
        pixels = found.pixels
        for size in {1, max_batch_size}:
            self._run([_Item(pixels, PROBE_DECODE)] * size)
        own = self._captioner.opened.decode
        self._queue.note(Work(1, own.work), self._run([_Item(pixels, own)]))


def _message(caption: Caption, name: str | None, picture: Loaded, attention: bool) -> ImageCaption:
    return ImageCaption(
        name=name,
        caption=caption.text,
        log_prob=caption.log_prob,
        probability=math.exp(caption.log_prob),
        alternatives=[
            Alternative(
                caption=other.text, log_prob=other.log_prob, probability=math.exp(other.log_prob)
            )
            for other in caption.alternatives
        ],
        attention=_attention(caption.candidates[0]) if attention else None,
        attention_box=picture.box,
    )


def _attention(candidate: Candidate) -> list[WordAttention] | None:
    if candidate.attention is None:
        return None
    # As doubles: rounded float32 would be written with all the digits of their error.
    weights = candidate.attention.astype(np.float64).round(5)
    grids: Any = weights.tolist()
    return [
        WordAttention(word=word, weights=grid)
        for word, grid in zip(candidate.words, grids, strict=True)
    ]


def _picture() -> bytes:
    ramp = np.linspace(0, 255, 64, dtype=np.uint8)
    colours = np.stack(np.broadcast_arrays(ramp, ramp[:, None], np.uint8(128)), axis=-1)
    file = BytesIO()
    Image.fromarray(colours).save(file, "PNG")
    return file.getvalue()
