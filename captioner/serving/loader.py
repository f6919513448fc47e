"""Loading the images of requests: in child processes, in order, within a budget of memory."""

import asyncio
import functools
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from captioner.config import ImageLimits
from captioner.errors import ImageError, ImageTooLargeError, ImageTypeError, OutOfReachError
from captioner.images.fence import Fence
from captioner.images.load import Fit, Loaded, load_image, loading_bytes
from captioner.runtime.device import num_cores
from captioner.serving.errors import ErrorCode, RequestError
from captioner.serving.queue import Pace

_MOST = 8


class Budget:
    """An amount that many threads share: who wants more than is left waits."""

    def __init__(self, total: int):
        self._total = self._left = total
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, amount: int) -> Iterator[None]:
        """While the block runs, so much is taken; who wants more than there is at all takes everything."""
        amount = min(amount, self._total)
        with self._changed:
            self._changed.wait_for(lambda: amount <= self._left)
            self._left -= amount
        try:
            yield
        finally:
            with self._changed:
                self._left += amount
                self._changed.notify_all()


class Loader:
    """Images for one encoder. Whatever one of them does to the process that loads it, this one lives on."""

    def __init__(self, fit: Fit, limits: ImageLimits, max_loading_bytes: int):
        self._fit, self._limits = fit, limits
        self._size = min(_MOST, num_cores())
        self._threads = ThreadPoolExecutor(self._size, "load")
        load = functools.partial(load_image, fit=fit, limits=limits)
        self._fence = Fence(load, memory=limits.max_load_bytes + limits.max_bytes)
        self._budget = Budget(max_loading_bytes)
        self._pace, self._waiting = Pace(), 0

    def seconds(self, images: int) -> float:
        """Until so many more are loaded."""
        return self._pace.seconds(self._waiting + images) / self._size

    async def load_all(
        self, images: list[bytes], names: list[str | None], deadline: float
    ) -> list[Loaded]:
        """The images of a request.

        Args:
            deadline: of ``time.monotonic``.

        Raises:
            RequestError: one of them is refused, or the time is over.
        """
        loop = asyncio.get_running_loop()
        self._waiting += len(images)
        try:
            found = await asyncio.gather(
                *(loop.run_in_executor(self._threads, self.load, data, deadline) for data in images)
            )
        finally:
            self._waiting -= len(images)
        good = []
        for position, one in enumerate(found):
            if isinstance(one, RequestError):
                raise one.of_image(position, names)
            good.append(one)
        return good

    def load(self, data: bytes, deadline: float) -> Loaded | RequestError:
        """One image, or why it is refused."""
        began = time.monotonic()
        if began > deadline:
            return RequestError(ErrorCode.OVERLOADED)
        try:
            with self._budget.hold(loading_bytes(data, self._fit, self._limits)):
                if time.monotonic() > deadline:  # it waited too long for its share
                    return RequestError(ErrorCode.OVERLOADED)
                [found] = self._fence.load([data])
        except ImageError as error:  # of its header alone
            found = error
        except OutOfReachError:  # the machine has no memory left for it now
            return RequestError(ErrorCode.OVERLOADED)
        finally:
            self._pace.note(time.monotonic() - began, 1)
        if isinstance(found, ImageTooLargeError):
            return RequestError(ErrorCode.IMAGE_TOO_LARGE, str(found))
        if isinstance(found, ImageTypeError):
            return RequestError(ErrorCode.TYPE_NOT_ALLOWED, str(found))
        if isinstance(found, ImageError):
            return RequestError(ErrorCode.NOT_AN_IMAGE, str(found), "send an intact picture")
        left, top, right, bottom = found["box"]
        return Loaded(found["pixels"], None, (left, top, right, bottom))
