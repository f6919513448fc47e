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

Indices = np.ndarray[Any, np.dtype[np.int64]]
Plan = list[list[Indices]]


def caption_units(image_rows: Indices, *, grouped: bool) -> Indices:
    """Units of a split [U, K]: each caption alone, or, ``grouped``, the captions of each image together.

    Args:
        image_rows: int64 [N], each caption's image.
    """
    if not grouped:
        return np.arange(len(image_rows))[:, None]
    order = np.argsort(image_rows, kind="stable")
    _, first, counts = np.unique(image_rows[order], return_index=True, return_counts=True)
    units = np.full((len(first), int(counts.max())), -1)
    within = np.arange(len(order)) - np.repeat(first, counts)
    units[np.repeat(np.arange(len(first)), counts), within] = order
    return units


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
    per_batch = max(1, global_batch // units.shape[1])
    keys = unit_lengths(units, lengths)
    shuffled = generator.permutation(len(units))
    batches = []
    for start in range(0, len(shuffled), WINDOW * per_batch):
        window = shuffled[start : start + WINDOW * per_batch]
        batches += _by_length(window, keys, per_batch)
    chosen = [units[batches[position]] for position in generator.permutation(len(batches))]
    return [[batch[rank::workers] for rank in range(workers)] for batch in chosen]


def sequential_plan(units: Indices, lengths: Indices, global_batch: int, workers: int) -> Plan:
    """Steps of a validation pass: by length, always the same."""
    per_batch = max(1, global_batch // units.shape[1])
    batches = _by_length(np.arange(len(units)), unit_lengths(units, lengths), per_batch)
    return [[units[batch][rank::workers] for rank in range(workers)] for batch in batches]


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
        per_worker = max(1, global_batch // captions // len(shares))
        columns = []
        for units in shares:
            keys = unit_lengths(units, lengths)
            order = generator.permutation(len(units)) if shuffle else np.arange(len(units))
            columns.append([units[batch] for batch in _by_length(order, keys, per_worker)])
        steps = max(len(column) for column in columns)
        nothing = np.empty((0, captions), np.int64)
        order = generator.permutation(steps) if shuffle else np.arange(steps)
        for step in order:
            plan.append([column[step] if step < len(column) else nothing for column in columns])
    return plan


def _by_length(chosen: Indices, keys: Indices, size: int) -> list[Indices]:
    by_length = chosen[np.argsort(keys[chosen], kind="stable")]
    return [by_length[start : start + size] for start in range(0, len(by_length), size)]
