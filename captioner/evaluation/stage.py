"""The evaluation's stage where it scores pictures: pictures -> captions and sums under teacher forcing."""

import pyarrow as pa

from captioner import storage
from captioner.config import DecodeConfig, ImageLimits
from captioner.features.stage import PixelStage
from captioner.images.load import Fit
from captioner.runtime.device import prepare_device


class ScorePictures(PixelStage):
    """Pictures -> columns of ``SCORED``."""

    def __init__(
        self,
        model_uri: str,
        fit: Fit,
        decode: DecodeConfig,
        limits: ImageLimits,
        *,
        references: str,
        drawn: frozenset[str],
        threads: int,
    ):
        """
        Args:
            references: URI of a JSON file, raw captions by image id: a stage is sent to every task.
            drawn: ids of the images whose attention is wanted.
        """
        super().__init__(fit, limits, thumbnails=True)
        self.model_uri, self.decode, self.threads = model_uri, decode, threads
        self.references, self.drawn = references, drawn

    def prepare(self) -> None:
        # Here, for the tasks that load pictures have no use for the tensor library.
        from captioner.captioning.captioner import Captioner
        from captioner.evaluation.scoring import score_encoded

        self.captioner = Captioner.load(self.model_uri, prepare_device(threads=self.threads))
        # Now, or the actor would be handed pictures while others that are ready have none.
        self.captioner.get_ready()
        self.captions = storage.read_json(self.references)
        self.score = score_encoded

    def __call__(self, batch: pa.Table) -> pa.Table:
        names = batch["image_id"].to_pylist()
        return self.score(
            self.captioner,
            self.captioner.encode(self.pictures(batch)),
            [self.captions[name] for name in names],
            [name in self.drawn for name in names],
            self.decode,
        )
