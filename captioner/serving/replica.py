"""One model's deployment: loads images on threads and batches them for the model, which runs on one of its own."""

import asyncio
import logging
import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from captioner.captioning.captioner import Candidate, Caption, Captioner
from captioner.config import DecodeConfig, ImageLimits
from captioner.errors import CaptionerError, ImageError, ImageTooLargeError, ImageTypeError
from captioner.images.load import Loaded, load_image
from captioner.runtime.device import num_cores, prepare_device
from captioner.serving.batcher import Batcher
from captioner.serving.errors import ErrorCode, RequestError
from captioner.serving.messages import (
    Alternative,
    CaptionResponse,
    ImageCaption,
    Timing,
    WordAttention,
)
from captioner.serving.metrics import observe_batch

logger = logging.getLogger(__name__)

# Warm-up and health: a picture that exercises the whole path.
PROBE_DECODE = DecodeConfig(beam_size=1, max_length=5)
_MAX_LOADERS = 8


@dataclass(frozen=True)
class _Item:
    pixels: NDArray[np.uint8]
    decode: DecodeConfig


class CaptionModel:
    """A replica of one model. Ready once it has captioned a picture."""

    def __init__(
        self, name: str, uri: str, limits: ImageLimits, max_batch_size: int, threads: int | None
    ):
        self._name, self._limits = name, limits
        self._captioner = Captioner.load(uri, prepare_device(threads=threads))
        self._version = self._captioner.model.directory.version[:12]
        self._batcher = Batcher(self._run, max_batch_size)
        self._loaders = ThreadPoolExecutor(min(_MAX_LOADERS, num_cores()), "load")
        self._fit = self._captioner.model.record.encoder.spec.fit
        self._probe_picture = _picture()
        pixels = load_image(self._probe_picture, self._fit, limits).pixels
        for size in {1, max_batch_size}:  # memory and kernels of both extremes
            self._run([_Item(pixels, PROBE_DECODE)] * size)
        self._run([_Item(pixels, self._captioner.model.record.decode)])

    async def caption(
        self, images: list[bytes], names: list[str | None], decode: DecodeConfig, attention: bool
    ) -> CaptionResponse | RequestError:
        """Caption the images of one request; one that is refused is returned as its error."""
        loop = asyncio.get_running_loop()
        started = time.perf_counter()
        loaded = await asyncio.gather(
            *(loop.run_in_executor(self._loaders, self._load, data) for data in images)
        )
        good: list[Loaded] = []
        for position, found in enumerate(loaded):
            if isinstance(found, RequestError):
                return found.of_image(position, names)
            good.append(found)
        ready = time.perf_counter()
        answers = await asyncio.gather(
            *(self._batcher.submit(_Item(one.pixels, decode)) for one in good)
        )
        began = [when for _, when, _ in answers]
        return CaptionResponse(
            model=self._name,
            version=self._version,
            captions=[
                _message(caption, name, one, attention)
                for (caption, _, _), name, one in zip(answers, names, good, strict=True)
            ],
            timing=Timing(
                load_ms=round(1e3 * (ready - started), 2),
                wait_ms=round(1e3 * max(0.0, max(began) - ready), 2),
                model_ms=round(1e3 * (time.perf_counter() - max(began)), 2),
                batch_size=max(size for _, _, size in answers),
            ),
        )

    async def probe(self) -> None:
        """Caption a small picture, as a request would be."""
        found = await self.caption([self._probe_picture], [None], PROBE_DECODE, False)
        if isinstance(found, RequestError):
            raise CaptionerError(str(found))

    async def check_health(self) -> None:
        """Called by Ray Serve, which replaces a replica that raises or does not return."""
        await self.probe()

    def _load(self, data: bytes) -> Loaded | RequestError:
        try:
            return load_image(data, self._fit, self._limits)
        except ImageTooLargeError as error:
            return RequestError(ErrorCode.IMAGE_TOO_LARGE, str(error))
        except ImageTypeError as error:
            return RequestError(ErrorCode.TYPE_NOT_ALLOWED, str(error))
        except ImageError as error:
            return RequestError(ErrorCode.NOT_AN_IMAGE, str(error), "send an intact picture")

    def _run(self, items: list[_Item]) -> list[Caption]:
        """One forward pass for all; the search once for each of the configurations asked for."""
        features = self._captioner.encode(np.stack([item.pixels for item in items]))
        found: list[Caption | None] = [None] * len(items)
        for decode in {item.decode for item in items}:
            places = [place for place, item in enumerate(items) if item.decode == decode]
            chosen = {name: column[places] for name, column in features.items()}
            for place, caption in zip(
                places, self._captioner.caption_features(chosen, decode), strict=True
            ):
                found[place] = caption
        observe_batch(self._name, len(items))
        return [caption for caption in found if caption is not None]


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
