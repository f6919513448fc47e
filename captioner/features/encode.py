"""Extraction's stage: pictures -> features."""

import sys

import pyarrow as pa

from captioner.config import ImageLimits, Runtime
from captioner.encoders.spec import EncoderSpec
from captioner.features.stage import PIXELS, PixelStage, tensor
from captioner.runtime.device import prepare_device


class EncodeImages(PixelStage):
    """Pictures -> ``pooled`` and ``grid`` columns, those of other views too."""

    calls_on_gpu = 2

    def __init__(
        self,
        weights_uri: str,
        spec: EncoderSpec,
        limits: ImageLimits,
        *,
        grid: bool,
        mirrored: bool = False,
        crops: int = 0,
        thumbnails: bool = True,
        threads: int = 1,
        runtime: Runtime = "eager",
    ):
        super().__init__(spec.fit, limits, thumbnails=thumbnails)
        self.weights_uri, self.spec = weights_uri, spec
        self.threads, self.runtime = threads, runtime
        self.grid, self.mirrored, self.crops = grid, mirrored, crops
        self.most = sys.maxsize

    def prepare(self) -> None:
        # Here, for the tasks that load pictures have no use for the tensor library.
        from captioner.encoders.encoder import Encoder
        from captioner.encoders.feed import Feed

        device = prepare_device(threads=self.threads)
        self.encoder = Encoder.load(self.weights_uri, self.spec, device)
        if self.runtime == "compiled":
            from captioner.encoders.runtime import compile_encoder

            # Where it cannot be, the encoder is the slower one.
            compile_encoder(self.encoder)
        self.feed = Feed(self.encoder.device)

    def __call__(self, batch: pa.Table) -> pa.Table:
        tables: list[pa.Table] = []
        done = 0
        while done < len(batch):
            part = batch.slice(done, self.most)
            if (table := self._encode(part)) is None:
                # Half as many from now on, for whoever else is on the device stays there.
                self.most = len(part) // 2
                continue
            tables.append(table)
            done += len(part)
        return pa.concat_tables(tables)

    def _encode(self, batch: pa.Table) -> pa.Table | None:
        """None where the device's memory does not hold so many pictures."""
        import torch

        from captioner.encoders.views import other_views

        images, ids = tensor(batch, PIXELS), batch["image_id"].to_pylist()
        vectors = {}
        try:
            with self.feed.turn():
                pixels = self.feed.put(images)
                views = other_views(
                    pixels, ids, self.feed, mirrored=self.mirrored, crops=self.crops
                )
                for suffix, shown in (("", pixels), *views):
                    pooled, cells = self.encoder(shown, grid=self.grid)
                    vectors[f"pooled{suffix}"] = pooled
                    if cells is not None:
                        vectors[f"grid{suffix}"] = cells
                found = self.feed.fetch(vectors)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
            return None
        to_column = pa.FixedShapeTensorArray.from_numpy_ndarray
        return pa.table({name: to_column(array) for name, array in found.items()})
