"""Which split an image belongs to: by a name, by Flickr8k's lists, or by a hash of its id."""

import hashlib
import logging
import posixpath
import re
from collections import Counter
from collections.abc import Iterable

from captioner.config import Split

logger = logging.getLogger(__name__)

_NAMES: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "eval": "validation",
    "evaluation": "validation",
    "test": "test",
    "testing": "test",
    "holdout": "test",
    "heldout": "test",
    "restval": "train",  # COCO's validation images that Karpathy's split trains on
}
_LISTS: dict[str, Split] = {
    "trainImages.txt": "train",
    "devImages.txt": "validation",
    "testImages.txt": "test",
}


def split_called(name: str) -> Split | None:
    """The split of a name such as ``dev``, ``testA``, ``val2017``, ``train_clean``, ``mini_val`` or Karpathy's
    ``restval``; None for one that says none."""
    words = re.split(r"[^a-z]+", name.strip().lower())
    for word in words:
        if word in _NAMES:
            return _NAMES[word]
    for word in words:
        for start in ("train", "test", "val", "dev", "eval"):
            if word.startswith(start):
                return _NAMES[start]
    return None


def splits_called(names: Iterable[str], place: str) -> dict[str, Split | None]:
    """The splits of all names in a column. Names that are none (``unlabeled``) give None, which is said once; where no
    name is one (numbers of folds), all give None.

    Args:
        place: what is said of unknown names begins with it.
    """
    counts = Counter(names)
    splits = {name: split_called(name) for name in counts}
    unknown = [name for name, split in splits.items() if split is None]
    if unknown:
        some = ", ".join(f"{counts[name]:,} {name!r}" for name in unknown[:3])
        rest = " ..." if len(unknown) > 3 else ""
        logger.warning(
            "%s: none of train, validation and test: %s%s; source-options.split says where they belong",
            place, some, rest,
        )  # fmt: skip
    return splits


def split_of_folder(path: str) -> Split | None:
    """The split that the innermost folder called one names: ``train/1.jpg``, ``val2017/1.jpg``."""
    for part in reversed(path.lower().split("/")[:-1]):
        if match := re.fullmatch(r"([a-z]+)(\d{4})?", part):
            if match[1] in _NAMES:
                return _NAMES[match[1]]
    return None


def split_in_name(path: str) -> Split | None:
    """The split that a file's name says (``val-00000-of-00001.parquet``), or else the nearest directory's."""
    for part in reversed(path.lower().split("/")):
        # Digits end a word: captions_val2014.json.
        for word in re.split(r"[^a-z]+", part):
            if word in _NAMES:
                return _NAMES[word]
    return None


def split_of_list(path: str) -> Split | None:
    """The split whose image names a file lists (``Flickr_8k.devImages.txt``); None for any other file."""
    name = posixpath.basename(path)
    return next((split for suffix, split in _LISTS.items() if name.endswith(suffix)), None)


def hashed_split(image_id: str) -> Split:
    """80/10/10 by SHA-256, so that an image keeps its split when others come or go."""
    bucket = int.from_bytes(hashlib.sha256(image_id.encode()).digest()[:4], "big") % 10
    return "train" if bucket < 8 else "validation" if bucket == 8 else "test"
