"""One model's deployment: decodes images on threads and batches them for the model, which runs on one of its own."""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from captioner.artifacts.schema import GRID_SIDE
from captioner.captioning.captioner import Candidate, Caption, Captioner
from captioner.config import DecodeConfig, ImageLimits
from captioner.errors import CaptionerError, ImageError, ImageTooLargeError, ImageTypeError
from captioner.images.load import load_image
from captioner.runtime.device import num_cores, prepare_device
from captioner.serving.messages import (
    Alternative,
    Captioned,
    ImageCaption,
    Refused,
    WordAttention,
)
from captioner.serving.metrics import observe_batch

logger = logging.getLogger(__name__)

# Warm-up and health: a picture that exercises the whole path.
PROBE_DECODE = DecodeConfig(beam_size=1, max_length=5)
_MAX_LOADERS = 8

Item = TypeVar("Item")
Result = TypeVar("Result")


class Batcher(Generic[Item, Result]):
    """Runs a function of many items on one thread, and gives it whatever waits each time it is free.

    A lone item never waits for company, and under load batches are as full as the load makes them. Ray Serve's own
    ``serve.batch`` closes a batch by a clock while the previous one still runs: short waits give small batches under
    load, long ones make lone requests wait.
    """

    def __init__(self, run: Callable[[list[Item]], Sequence[Result]], max_size: int):
        self._run, self._max_size = run, max_size
        self._waiting: asyncio.Queue[tuple[Item, asyncio.Future[tuple[Result, float, int]]]] = (
            asyncio.Queue()
        )
        self._thread = ThreadPoolExecutor(1, "model")
        self._loop_task: asyncio.Task[None] | None = None

    async def submit(self, item: Item) -> tuple[Result, float, int]:
        """The result for one item, when its batch began (of ``time.perf_counter``), and the size of that batch."""
        if self._loop_task is None:
            self._loop_task = asyncio.create_task(self._work())
        future: asyncio.Future[tuple[Result, float, int]] = asyncio.Future()
        self._waiting.put_nowait((item, future))
        return await future

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = [await self._waiting.get()]
            while len(batch) < self._max_size and not self._waiting.empty():
                batch.append(self._waiting.get_nowait())
            # Of requests that were given up the future is cancelled.
            batch = [(item, future) for item, future in batch if not future.done()]
            if not batch:
                continue
            started = time.perf_counter()
            try:
                items = [item for item, _ in batch]
                results = await loop.run_in_executor(self._thread, self._run, items)
                answers = list(zip(batch, results, strict=True))
            except Exception as error:  # handed to every caller, who would wait for ever otherwise
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, future), result in answers:
                if not future.done():
                    future.set_result((result, started, len(batch)))


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
        self._version = self._captioner.model.record.weights_sha256[:12]
        self._batcher = Batcher(self._run, max_batch_size)
        self._decoders = ThreadPoolExecutor(min(_MAX_LOADERS, num_cores()), "decode")
        self._probe_picture = _picture()
        pixels = load_image(self._probe_picture, limits)
        for size in {1, max_batch_size}:  # memory and kernels of both extremes
            self._run([_Item(pixels, PROBE_DECODE)] * size)
        self._run([_Item(pixels, self._captioner.model.record.decode)])

    async def caption(
        self, images: list[bytes], names: list[str | None], decode: DecodeConfig, attention: bool
    ) -> Captioned | Refused:
        """Caption the images of one request."""
        loop = asyncio.get_running_loop()
        started = time.perf_counter()
        decoded = await asyncio.gather(
            *(loop.run_in_executor(self._decoders, self._decode, data) for data in images)
        )
        for position, found in enumerate(decoded):
            if isinstance(found, ImageError):
                return _refusal(position, found)
        good = [found for found in decoded if not isinstance(found, ImageError)]
        ready = time.perf_counter()
        answers = await asyncio.gather(
            *(self._batcher.submit(_Item(pixels, decode)) for pixels in good)
        )
        began = [when for _, when, _ in answers]
        return Captioned(
            captions=[
                _message(caption, name, attention)
                for (caption, _, _), name in zip(answers, names, strict=True)
            ],
            version=self._version,
            load_ms=1e3 * (ready - started),
            wait_ms=1e3 * max(0.0, max(began) - ready),
            model_ms=1e3 * (time.perf_counter() - max(began)),
            batch_size=max(size for _, _, size in answers),
        )

    async def probe(self) -> None:
        """Caption a small picture, as a request would be."""
        found = await self.caption([self._probe_picture], [None], PROBE_DECODE, False)
        if isinstance(found, Refused):
            raise CaptionerError(found.message)

    async def check_health(self) -> None:
        """Called by Ray Serve, which replaces a replica that raises or does not return."""
        await self.probe()

    def _decode(self, data: bytes) -> NDArray[np.uint8] | ImageError:
        try:
            return load_image(data, self._limits)
        except ImageError as error:
            return error

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


def _refusal(position: int, error: ImageError) -> Refused:
    if isinstance(error, ImageTooLargeError):
        advice = "send a smaller picture"
        return Refused(position=position, status=413, code="image_too_large", message=f"{error}: {advice}")  # fmt: skip
    if isinstance(error, ImageTypeError):
        return Refused(position=position, status=415, code="type_not_allowed", message=str(error))
    return Refused(
        position=position, status=400, code="not_an_image", message=f"{error}: send an intact picture"
    )  # fmt: skip


def _message(caption: Caption, name: str | None, attention: bool) -> ImageCaption:
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
    )


def _attention(candidate: Candidate) -> list[WordAttention] | None:
    if candidate.attention is None:
        return None
    grids: Any = candidate.attention.reshape(-1, GRID_SIDE, GRID_SIDE).round(5).tolist()
    return [
        WordAttention(word=word, weights=grid)
        for word, grid in zip(candidate.text.split(), grids, strict=True)
    ]


def _picture() -> bytes:
    ramp = np.linspace(0, 255, 64, dtype=np.uint8)
    colours = np.stack(np.broadcast_arrays(ramp, ramp[:, None], np.uint8(128)), axis=-1)
    file = BytesIO()
    Image.fromarray(colours).save(file, "PNG")
    return file.getvalue()
