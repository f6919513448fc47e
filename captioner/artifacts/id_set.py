"""Image ids at 16 bytes each, whatever they look like: which are in a set, and where they stand in a list."""

import copy
from collections.abc import Collection, Iterable, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np

# Of so many bytes, digests of all the pictures there are differ.
_BYTES = 16
_TYPE = np.dtype(f"S{_BYTES}")


class IdSet:
    """Which ids are in, and how many: they themselves are not kept, but digests of them."""

    def __init__(self, batches: Iterable[Sequence[str]] = ()):
        joined = bytearray()
        for batch in batches:
            joined += _digest(batch)
        every = np.frombuffer(joined, _TYPE)  # writable, for it is of a bytearray
        every.sort()
        again = every[1:] == every[:-1]
        self.repeated = int(again.sum())
        """How many ids came again."""
        self._digests = every[np.concatenate([[True], ~again])] if self.repeated else every
        self._again = np.unique(every[1:][again])
        self._prefix = ""

    def came_again(self) -> "IdSet":
        """Those that came more than once."""
        found = IdSet()
        found._digests = self._again
        return found

    def __len__(self) -> int:
        return len(self._digests)

    def __or__(self, other: "IdSet") -> "IdSet":
        both = IdSet()
        both._digests = np.union1d(self._digests, other._digests)
        both._prefix = self._prefix
        return both

    def behind(self, prefix: str) -> "IdSet":
        """The same set for who leaves away a prefix that the ids have."""
        short = copy.copy(self)
        short._prefix = self._prefix + prefix
        return short

    def holds(self, ids: Sequence[str]) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Whether each of the ids is in, bool [N]."""
        if not len(self):
            return np.zeros(len(ids), bool)
        if self._prefix:
            ids = [self._prefix + one for one in ids]
        asked = np.frombuffer(_digest(ids), _TYPE)
        place = np.searchsorted(self._digests, asked).clip(max=len(self) - 1)
        return np.asarray(self._digests[place] == asked)


class AllBut(IdSet):
    """All ids but a few."""

    def __init__(self, few: Collection[str]):
        super().__init__()
        self._few = frozenset(few)

    def holds(self, ids: Sequence[str]) -> np.ndarray[Any, np.dtype[np.bool_]]:
        return np.fromiter((self._prefix + one not in self._few for one in ids), bool, len(ids))


class IdRows:
    """Where each id stands in a list of different ids, at 24 bytes an id."""

    def __init__(self, batches: Iterable[Sequence[str]]):
        joined = bytearray()
        for batch in batches:
            joined += _digest(batch)
        digests = np.frombuffer(joined, _TYPE)
        self._order = np.argsort(digests)
        self._digests = digests[self._order]

    def find(self, ids: Sequence[str]) -> np.ndarray[Any, np.dtype[np.int64]]:
        """int64 [N]: the place of each of the ids, from 0; -1 for one that is not in the list."""
        if not len(self._digests):
            return np.full(len(ids), -1)
        asked = np.frombuffer(_digest(ids), _TYPE)
        place = np.searchsorted(self._digests, asked).clip(max=len(self._digests) - 1)
        return np.where(self._digests[place] == asked, self._order[place], -1)


def content_key(image_id: str, digest: str | None) -> str:
    """Image and content as one id.

    Args:
        digest: SHA-256 of the encoded bytes.
    """
    return f"{image_id}\n{digest}"


def _digest(ids: Sequence[str]) -> bytes:
    return b"".join([blake2b(one.encode(), digest_size=_BYTES).digest() for one in ids])


NONE = IdSet()
