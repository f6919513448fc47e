"""What goes between a machine's memory and a device's, beside the arithmetic there.

Two calls at the same time, each in a thread with a stream of its own, overlap all of it: one's pictures are copied to
the device and its vectors back, and the host handles both, while the other's network computes. A stream for the copies
of a single call would overlap these alone, which are the smaller part.
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, Any]


class Feed:
    """A device, for any number of threads of a process."""

    def __init__(self, device: torch.device):
        self.device = device
        # Memory that a GPU copies from and to by itself; torch keeps it for the next batch.
        self._pins = device.type == "cuda"
        self._threads = threading.local()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """What a thread does on the device: on a GPU in a stream of its own."""
        if self._pins and not hasattr(self._threads, "stream"):
            self._threads.stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._threads.stream) if self._pins else nullcontext():
            yield

    def put(self, array: Array) -> Tensor:
        """An array on the device; nobody waits for the copy."""
        # A copy on a CPU, too: torch warns about memory it may not write, which that of Ray's object store is.
        kind = torch.from_numpy(np.empty(0, array.dtype)).dtype
        here = torch.empty(array.shape, dtype=kind, pin_memory=self._pins)
        np.copyto(here.numpy(), array)
        return here.to(self.device, non_blocking=True)

    def fetch(self, tensors: Mapping[str, Tensor]) -> dict[str, Array]:
        """Tensors of the device in the machine's memory, all waited for at once."""
        here = {
            name: torch.empty(one.shape, dtype=one.dtype, pin_memory=self._pins)
            for name, one in tensors.items()
        }
        for name, one in tensors.items():
            here[name].copy_(one, non_blocking=True)
        if self._pins:
            torch.cuda.current_stream(self.device).synchronize()
        return {name: one.numpy() for name, one in here.items()}
