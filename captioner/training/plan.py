"""The order in which training sees captions: every one exactly once an epoch, whatever the number of workers.

A *unit* is what stays together: one caption, or all captions of an image. Units are rows of an int64 array [U, K] of
caption numbers, -1 where an image has fewer than K captions. A *share* is the units of one worker in one global batch,
and a *plan* is the shares of every worker, step by step.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

# Units are sorted by length within windows of this many batches, so that a batch holds captions of similar length and
# little padding, while the order across windows stays random.
WINDOW = 40

# What it costs to read and project a picture once more, in captions.
_PICTURE = 4

Indices = np.ndarray[Any, np.dtype[np.int64]]
Plan = list[list[Indices]]


def caption_units(image_rows: Indices, *, grouped: bool, picture: int = _PICTURE) -> Indices:
    """Units of a split [U, K]: each caption alone, or, ``grouped``, captions of an image together.

    K is what keeps the work least, of padding and of pictures that come more than once: an image with more captions
    than that makes several units, so that one with many does not widen all others.

    Args:
        image_rows: int64 [N], each caption's image.
        picture: what it costs to have one once more, in captions.
    """
    if not grouped:
        return np.arange(len(image_rows))[:, None]
    order = np.argsort(image_rows, kind="stable")
    _, first, counts = np.unique(image_rows[order], return_index=True, return_counts=True)
    width = _group_width(counts, picture)
    within = np.arange(len(order)) - np.repeat(first, counts)
    parts = -(-counts // width)
    units = np.full((int(parts.sum()), width), -1)
    start = np.repeat(np.cumsum(parts) - parts, counts)
    units[start + within // width, within % width] = order
    return units


def _group_width(counts: Indices, picture: int) -> int:
    """Captions of a unit, where images have so many each, for the least work."""
    images = np.bincount(counts)
    sizes = np.flatnonzero(images)
    work = [
        int((images[sizes] * -(-sizes // width)).sum()) * (width + picture)
        for width in range(1, len(images))
    ]
    return 1 + int(np.argmin(work))


def first_captions(image_rows: Indices) -> Indices:
    """A unit for each image [I, 1]: its first caption."""
    return np.unique(image_rows, return_index=True)[1][:, None]


def unit_lengths(units: Indices, lengths: Indices) -> Indices:
    """Tokens of the longest caption of each unit [U]."""
    longest: Indices = np.where(units >= 0, lengths[units], 0).max(axis=1)
    return longest


def epoch_plan(
    units: Indices, lengths: Indices, global_batch: int, epoch: int, seed: int, workers: int
) -> Plan:
    """Steps of one epoch over units that are all in memory.

    Args:
        units: int64 [U, K].
        lengths: tokens of each caption [N].
        global_batch: captions of a step, over all workers.
        epoch: counted from 0; decides the order together with ``seed``.
    """
    generator = np.random.default_rng((seed, epoch))
    keys = unit_lengths(units, lengths)
    shuffled = generator.permutation(len(units))
    batches: list[Indices] = []
    for window in _cut(units, shuffled, WINDOW * global_batch):
        batches += _by_length(units, window, keys, global_batch)
    chosen = [batches[position] for position in generator.permutation(len(batches))]
    return [_dealt(units[batch], workers) for batch in chosen]


def sequential_plan(units: Indices, lengths: Indices, global_batch: int, workers: int) -> Plan:
    """Steps of a validation pass: by length, always the same."""
    keys = unit_lengths(units, lengths)
    batches = _by_length(units, np.arange(len(units)), keys, global_batch)
    return [_dealt(units[batch], workers) for batch in batches]


def streaming_plan(
    windows: Sequence[Sequence[Indices]],
    lengths: Indices,
    global_batch: int,
    epoch: int,
    seed: int,
    *,
    shuffle: bool,
) -> Plan:
    """Steps of one pass over windows of a store that does not fit in memory.

    Within a window every worker draws from units of its own, so that it reads only those.

    Args:
        windows: for each window, the units [U, K] of each worker; some may have none.
        shuffle: draw units and steps of a window at random; else by length.
    """
    generator = np.random.default_rng((seed, epoch, 1))
    plan: Plan = []
    for shares in windows:
        captions = max(units.shape[1] for units in shares)
        per_worker = max(1, global_batch // len(shares))
        columns = []
        for units in shares:
            keys = unit_lengths(units, lengths)
            order = generator.permutation(len(units)) if shuffle else np.arange(len(units))
            columns.append([units[batch] for batch in _by_length(units, order, keys, per_worker)])
        steps = max(len(column) for column in columns)
        nothing = np.empty((0, captions), np.int64)
        order = generator.permutation(steps) if shuffle else np.arange(steps)
        for step in order:
            shares_of_step = [column[step] if step < len(column) else nothing for column in columns]
            plan.append([_trimmed(share) for share in shares_of_step])
    return plan


def _by_length(units: Indices, chosen: Indices, keys: Indices, captions: int) -> list[Indices]:
    """Units by length, in batches of so many captions."""
    return _cut(units, chosen[np.argsort(keys[chosen], kind="stable")], captions)


def _cut(units: Indices, chosen: Indices, captions: int) -> list[Indices]:
    """Units in pieces of so many captions; a piece ends with the unit that comes nearest to that."""
    if not len(chosen):
        return []
    held = (units[chosen] >= 0).sum(axis=1)
    before = np.cumsum(held) - held
    # The piece that a unit's middle falls into.
    piece = ((2 * before + held - 1) // 2) // captions
    return np.split(chosen, np.flatnonzero(np.diff(piece)) + 1)


def _dealt(batch: Indices, workers: int) -> list[Indices]:
    return [_trimmed(batch[rank::workers]) for rank in range(workers)]


def _trimmed(share: Indices) -> Indices:
    """A share without the columns that none of its units needs, one at least."""
    return share[:, : max(1, int((share >= 0).sum(axis=1).max(initial=0)))]
