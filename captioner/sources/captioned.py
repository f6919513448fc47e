"""The captioned images of some splits of a source, for jobs that read pictures and captions together."""

from collections import Counter
from collections.abc import Iterator, Sequence

from captioner.artifacts.id_set import IdSet
from captioner.config import Split
from captioner.errors import SourceError
from captioner.sources.base import Source
from captioner.sources.growing import Remaining

Captions = dict[str, list[str]]
"""Raw captions by image id (sorted), in their original order."""


def captioned(source: Source, splits: Sequence[Split]) -> tuple[Source, dict[Split, Captions]]:
    """A source without all other images, and the captions of each split.

    Raises:
        SourceError: a split has no captions, or they cannot be read.
    """
    found: dict[Split, Captions] = {split: {} for split in splits}
    counts: Counter[str] = Counter()

    def others() -> Iterator[list[str]]:
        for batch in source.captions():
            left_out: dict[str, None] = {}
            columns = (batch[name].to_pylist() for name in ("image_id", "split", "caption"))
            for image_id, split, caption in zip(*columns, strict=True):
                if caption is not None:
                    counts[split] += 1
                if caption is None or split not in found:
                    left_out[image_id] = None
                else:
                    found[split].setdefault(image_id, []).append(caption)
            yield list(left_out)

    kept = IdSet(others())
    for split in splits:
        if not found[split]:
            there = ", ".join(f"{name} ({count:,})" for name, count in counts.items()) or "nowhere"
            raise SourceError(
                f"{source.identity().uri} has no captions in split {split!r}; it has captions in: {there}"
            )
    captions = {split: dict(sorted(images.items())) for split, images in found.items()}
    wanted = sum(map(len, captions.values()))
    return Remaining(source, kept, wanted), captions
