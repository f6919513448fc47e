"""Which split an image belongs to: by a name, by Flickr8k's lists, or by a hash of its id."""

import hashlib
import posixpath
import re

from captioner.config import Split

_NAMES: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "restval": "train",  # COCO's validation images that Karpathy's split trains on
}
_LISTS: dict[str, Split] = {
    "trainImages.txt": "train",
    "devImages.txt": "validation",
    "testImages.txt": "test",
}


def split_called(name: str) -> Split | None:
    """The split of a name such as ``dev`` or Karpathy's ``restval``; None for an unknown one."""
    return _NAMES.get(name.strip().lower())


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
