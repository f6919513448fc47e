"""Extraction's stage: pictures -> features."""

import pyarrow as pa

from captioner.config import ImageLimits
from captioner.encoders.spec import EncoderSpec
from captioner.features.stage import PIXELS, PixelStage, tensor
from captioner.images.views import other_views
from captioner.runtime.device import prepare_device


class EncodeImages(PixelStage):
    """Pictures -> ``pooled`` and ``grid`` columns, those of other views too."""

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
    ):
        super().__init__(spec, limits, thumbnails=thumbnails)
        self.weights_uri, self.threads = weights_uri, threads
        self.grid, self.mirrored, self.crops = grid, mirrored, crops

    def prepare(self) -> None:
        # Here, for the tasks that load pictures have no use for the tensor library.
        from captioner.encoders.encoder import Encoder

        device = prepare_device(threads=self.threads)
        self.encoder = Encoder.load(self.weights_uri, self.spec, device)

    def __call__(self, batch: pa.Table) -> pa.Table:
        images, ids = tensor(batch, PIXELS), batch["image_id"].to_pylist()
        views = other_views(images, ids, mirrored=self.mirrored, crops=self.crops)
        columns = {}
        for suffix, pixels in (("", images), *views):
            pooled, cells = self.encoder(pixels, grid=self.grid)
            found = {"pooled": pooled} if cells is None else {"pooled": pooled, "grid": cells}
            for name, values in found.items():
                array = values.cpu().numpy()
                columns[f"{name}{suffix}"] = pa.FixedShapeTensorArray.from_numpy_ndarray(array)
        return pa.table(columns)
