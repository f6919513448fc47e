"""What a pipeline does with pictures: loading on CPUs, a network on model actors."""

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import pyarrow as pa

from captioner.artifacts.tables import THUMBNAIL
from captioner.config import ImageLimits
from captioner.images.fence import memory_limit
from captioner.images.load import Fit, load_image

PIXELS, SIDES = "pixels", "sides"


class Stage(ABC):
    """What a pipeline does with pictures. It is made of plain settings and sent to every task and actor; what is heavy
    comes with ``prepare``.
    """

    loaded: pa.Schema
    """What ``load`` gives, by name: tensors of fixed shape, or bytes."""

    loading_bytes = memory_limit(ImageLimits())
    """Memory that ``load`` may take for one picture."""

    calls_on_gpu = 1
    """Calls at the same time, each in a thread, of a model actor that has a GPU: with two, one copies while the other
    computes."""

    @abstractmethod
    def load(self, data: bytes) -> dict[str, Any]:
        """One encoded picture on a CPU: an array for every tensor of ``loaded``, and bytes or None.

        Called in a child process, inside a ``Fence``: whatever else it raises, and its end, is an error of the picture.

        Raises:
            ImageError: it is no picture that is accepted.
        """

    @abstractmethod
    def prepare(self) -> None:
        """Make ready for batches: called once in every model actor."""

    @abstractmethod
    def __call__(self, batch: pa.Table) -> pa.Table:
        """Output columns for the pictures of a batch, in their order.

        Args:
            batch: ``image_id`` and the columns of ``loaded``, of N pictures.
        """


def tensor(batch: pa.Table, name: str) -> np.ndarray[Any, Any]:
    """A column of tensors as one array [N, ...], without a copy where it is one piece."""
    column = batch[name].combine_chunks()
    column = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
    array: np.ndarray[Any, Any] = column.to_numpy_ndarray()
    return array


class PixelStage(Stage):
    """A stage whose network sees pixels as ``fit`` makes them, uint8 [rows, columns, 3]; and thumbnails if asked."""

    def __init__(self, fit: Fit, limits: ImageLimits, *, thumbnails: bool):
        self.fit, self.limits, self.thumbnails = fit, limits, thumbnails
        self.loading_bytes = memory_limit(limits)
        pixels = pa.field(PIXELS, pa.fixed_shape_tensor(pa.uint8(), [*fit.size, 3]))
        # Pictures of several sizes lie in the upper left corners of tensors of one.
        sides = pa.field(SIDES, pa.fixed_shape_tensor(pa.int32(), [2]))
        within = [sides] * (fit.resize == "within")
        self.loaded = pa.schema([pixels, *within, *[THUMBNAIL] * thumbnails])

    def load(self, data: bytes) -> dict[str, Any]:
        found = load_image(data, self.fit, self.limits, thumbnail=self.thumbnails)
        columns: dict[str, Any] = {PIXELS: found.pixels}
        if self.fit.resize == "within":
            rows, width, _ = found.pixels.shape
            columns[PIXELS] = np.zeros((*self.fit.size, 3), np.uint8)
            columns[PIXELS][:rows, :width] = found.pixels
            columns[SIDES] = np.array([rows, width], np.int32)
        return columns | {THUMBNAIL.name: found.thumbnail} if self.thumbnails else columns

    def pictures(self, batch: pa.Table) -> np.ndarray[Any, Any] | list[np.ndarray[Any, Any]]:
        """The pixels of a batch: [N, rows, columns, 3], or each picture's where they differ in size."""
        pixels = tensor(batch, PIXELS)
        if SIDES not in batch.column_names:
            return pixels
        return [
            picture[:rows, :columns]
            for picture, (rows, columns) in zip(pixels, tensor(batch, SIDES).tolist(), strict=True)
        ]


class CheckPictures(PixelStage):
    """Loads each picture once, to know which can be loaded; nothing else becomes of it."""

    def __init__(self, fit: Fit, limits: ImageLimits):
        super().__init__(fit, limits, thumbnails=False)
        self.loaded = pa.schema([])

    def load(self, data: bytes) -> dict[str, Any]:
        super().load(data)
        return {}

    def prepare(self) -> None:
        pass

    def __call__(self, batch: pa.Table) -> pa.Table:
        return pa.table({})


class LoadPictures(PixelStage):
    """Loads pictures for a network elsewhere."""

    def prepare(self) -> None:
        pass

    def __call__(self, batch: pa.Table) -> pa.Table:
        return batch.select([PIXELS])
