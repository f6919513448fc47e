"""The captioning job's stage: pictures -> captions."""

import pyarrow as pa
import regex

from captioner.artifacts.tables import CAPTIONED_ROWS
from captioner.config import DecodeConfig, ImageLimits
from captioner.features.stage import PixelStage
from captioner.images.load import Fit
from captioner.runtime.device import prepare_device

_WORD = regex.compile(r"[\p{L}\p{N}]\p{M}*\Z")
# Scripts with a full stop of their own, at the end of a text; Thai and Lao do without.
_STOPS = [
    (regex.compile(rf"[{scripts}]\p{{M}}*\Z"), stop)
    for scripts, stop in (
        (r"\p{Han}\p{Hiragana}\p{Katakana}", "\u3002"),
        (r"\p{Devanagari}\p{Bengali}", "\u0964"),
        (r"\p{Khmer}", "\u17d4"),
        (r"\p{Thai}\p{Lao}", ""),
    )
]


def sentence(caption: str) -> str:
    """A caption with a capital and a full stop, its script's own, where it ends in a word."""
    text = caption[:1].title() + caption[1:]
    if not _WORD.search(text):
        return text
    return text + next((stop for script, stop in _STOPS if script.search(text)), ".")


class CaptionImages(PixelStage):
    """Pictures -> ``caption``, ``log_prob`` and ``alternatives`` columns."""

    def __init__(
        self,
        model_uri: str,
        fit: Fit,
        decode: DecodeConfig,
        limits: ImageLimits,
        *,
        thumbnails: bool,
        sentences: bool,
        threads: int,
    ):
        super().__init__(fit, limits, thumbnails=thumbnails)
        self.model_uri, self.decode, self.threads = model_uri, decode, threads
        self.written = sentence if sentences else str

    def prepare(self) -> None:
        # Here, for the tasks that load pictures have no use for the tensor library.
        from captioner.captioning.captioner import Captioner

        self.captioner = Captioner.load(self.model_uri, prepare_device(threads=self.threads))
        # Now, or the actor would be handed pictures while others that are ready have none.
        self.captioner.get_ready()

    def __call__(self, batch: pa.Table) -> pa.Table:
        captions = self.captioner.caption_pixels(self.pictures(batch), self.decode)
        alternatives = [
            [
                {"caption": self.written(other.text), "log_prob": other.log_prob}
                for other in one.alternatives
            ]
            for one in captions
        ]
        return pa.table(
            {
                "caption": [self.written(caption.text) for caption in captions],
                "log_prob": pa.array([caption.log_prob for caption in captions], pa.float32()),
                "alternatives": pa.array(alternatives, CAPTIONED_ROWS.field("alternatives").type),
            }
        )
