"""Feature columns of images and of their other views: which view an epoch shows, rows of it, statistics."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from captioner.artifacts.tables import column_name
from captioner.decoders.base import Features
from captioner.encoders.spec import Column
from captioner.training.data import CaptionData
from captioner.training.plan import Indices


def stored_columns(columns: Sequence[Column], views: Sequence[str]) -> tuple[str, ...]:
    """Names in the store of these columns of these views."""
    return tuple(column_name(column, view) for view in views for column in columns)


def by_view(
    table: Mapping[str, Tensor], columns: Sequence[Column], views: Sequence[str]
) -> list[Features]:
    """The columns of each view, from those of the store."""
    return [{column: table[column_name(column, view)] for column in columns} for view in views]


def sample_views(data: CaptionData, views: int, seed: int, epoch: int) -> Indices:
    """The view that an epoch shows of each image of a split, int64 in [0, views)."""
    generator = np.random.default_rng((seed, epoch, 3))
    return generator.integers(views, size=int(data.image_rows.max()) + 1)


def pick(views: Sequence[Features], rows: Indices, shown: Indices | None) -> Features:
    """Rows of feature columns as float32.

    Args:
        rows: int64 [I].
        shown: int64 [I], the view to take of each; None: the image itself.
    """
    if shown is None:
        shown = np.zeros_like(rows)
    features: Features = {}
    for name, own in views[0].items():
        features[name] = torch.empty(len(rows), *own.shape[1:])
        for view in np.unique(shown):
            places = np.flatnonzero(shown == view)
            chosen = views[view][name][torch.from_numpy(rows[places])]
            features[name][torch.from_numpy(places)] = chosen.float()
    return features


def moments(pieces: Iterator[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel of pieces [..., C], float32 [C] each."""
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for piece in pieces:
        flat = piece.reshape(-1, piece.shape[-1]).double()
        count += len(flat)
        total = total + flat.sum(0)
        squares = squares + flat.square().sum(0)
    mean = total / count
    return mean.float(), (squares / count - mean.square()).clamp(min=0).sqrt().float()
