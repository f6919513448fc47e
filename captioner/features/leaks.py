"""Pictures of a split that are among those a model is trained on."""

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import normalize

from captioner.artifacts.feature_store import FeatureStore

logger = logging.getLogger(__name__)

# Cosine of pooled vectors above which two files show one picture, saved again.
SAME = 0.999
# Multiplications that a look may take, a minute or two of two cores, and bytes of vectors that it may hold. Past them
# only equal bytes are found.
_MOST_WORK, _MOST_BYTES = 2e12, 2**30
_EXAMPLES = 3
# Pictures of train whose files are opened together.
_CHUNK = 2**13


@dataclass(frozen=True)
class Leaks:
    """Pictures of ``split`` that are in train, too."""

    split: str
    pairs: list[tuple[str, str]]
    """Ids: in the split, and one of those in train. Sorted."""
    by_vectors: bool
    """Whether vectors were compared, too; bytes always are."""

    def __str__(self) -> str:
        shown = ", ".join(f"{one} = {other}" for one, other in self.pairs[:_EXAMPLES])
        how = f"equal bytes, or a cosine over {SAME}" if self.by_vectors else "equal bytes"
        count = len(self.pairs)
        pictures = "1 picture" if count == 1 else f"{count:,} pictures"
        return f"{pictures} of split {self.split} in train, too ({how}): {shown}"


def find_leaks(store: FeatureStore, split: str) -> Leaks:
    """Compare the good pictures of a split with those of train, by the bytes of their files and by pooled vectors.

    Vectors of random networks are all alike and are not compared.

    Raises:
        StoreError: a file is missing or damaged.
    """
    splits = store.manifest.splits
    if split == "train" or not {split, "train"} <= splits.keys():
        return Leaks(split, [], False)
    encoder = store.manifest.encoder
    numbers = splits[split].images * encoder.spec.pooled_channels
    few = numbers * splits["train"].images <= _MOST_WORK and 4 * numbers <= _MOST_BYTES
    by_vectors = few and not encoder.weights.startswith("random")
    columns = ["image_id", "sha256", *["pooled"] * by_vectors]
    held = [chunk.read(columns) for chunk in store.chunks(split, _CHUNK)]
    ids = np.concatenate([part["image_id"] for part in held])
    named: dict[str | None, list[str]] = {}
    for part in held:
        for name, digest in zip(part["image_id"], part["sha256"], strict=True):
            named.setdefault(digest, []).append(name)
    named.pop(None, None)
    vectors = _unit(np.concatenate([part["pooled"] for part in held])) if by_vectors else None
    equal: dict[str, str] = {}
    alike: dict[str, str] = {}
    best = torch.full((len(ids),), SAME)
    for chunk in store.chunks("train", _CHUNK):
        for _, part in chunk.batches(columns):
            for name, digest in zip(part["image_id"], part["sha256"], strict=True):
                for same in named.get(digest, ()):
                    equal.setdefault(same, name)
            if vectors is None:
                continue
            values, places = (vectors @ _unit(part["pooled"]).T).max(dim=1)
            for row in torch.nonzero(values > best)[:, 0].tolist():
                alike[ids[row]] = part["image_id"][places[row]]
            best = torch.maximum(best, values)
    return Leaks(split, sorted((alike | equal).items()), by_vectors)


def tell_leaks(store: FeatureStore, *splits: str) -> list[Leaks]:
    """Warn of each split of which pictures are in train, too; returns what was found."""
    found = [leaks for split in splits if (leaks := find_leaks(store, split)).pairs]
    for leaks in found:
        logger.warning("%s", leaks)
    return found


def _unit(vectors: np.ndarray[Any, Any]) -> torch.Tensor:
    return normalize(torch.tensor(vectors), dim=1)
