"""Flickr8k and Flickr30k from the Hugging Face hub: fetched once into its cache, then read as Parquet files.

Copies were chosen that are plain Parquet (loading scripts no longer run), with the five captions people wrote, split by
file as published; what follows is said by their cards. Flickr8k: ``jxie/flickr8k``, columns image and caption_0 to
caption_4, 6,000 train, 1,000 validation and 1,000 test rows. Flickr30k: ``umaru97/flickr30k_train_val_test``, columns
image, caption and sentids (lists), split, img_id and filename, 29,000 train, 1,014 val and 1,000 test rows, which are
the sizes of Karpathy's splits. Passed over: ``nlphuji/flickr30k`` (a script over a zip file), ``lmms-lab/flickr30k``
(31,783 images in one split, with no column that tells them apart), ``AnyModal/flickr30k`` and
``Mozilla/flickr30k-transformed-captions`` (captions rewritten by a language model).

The row counts are checked against the cards on every opening. On several machines the cache ($HF_HOME) must be a folder
that all of them see, as must any other local source.
"""

import logging
from dataclasses import dataclass

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError  # type: ignore[attr-defined]

from captioner import storage
from captioner.errors import SourceError
from captioner.sources.parquet import ParquetSource
from captioner.sources.parquet_files import is_parquet
from captioner.sources.place import Place

logger = logging.getLogger(__name__)

OPTIONS = frozenset(("captions", "caption_columns", "id_column", "limit"))
"""Settings of ``SourceConfig`` that say something here."""


@dataclass(frozen=True)
class Repository:
    """A dataset repository and the images it must hold."""

    name: str
    images: dict[str, int]
    """By split."""


REPOSITORIES = {
    "flickr8k": Repository("jxie/flickr8k", {"train": 6000, "validation": 1000, "test": 1000}),
    "flickr30k": Repository(
        "umaru97/flickr30k_train_val_test", {"train": 29000, "validation": 1014, "test": 1000}
    ),
}
NAMES = tuple(REPOSITORIES)


def open_place(place: Place) -> ParquetSource | None:
    """A data set's Parquet files, from the hub's cache or, the first time, from the hub; None for any other name.

    Raises:
        SourceError: they are not in the cache and the hub cannot be reached, or they are not all there.
    """
    name = place.spec
    if name not in REPOSITORIES:
        return None
    repository = REPOSITORIES[name]
    advice = (
        f"on a machine with a network run 'hf download --repo-type dataset {repository.name}' (the cache is "
        "$HF_HOME/hub), or give the folder of its Parquet files as the source"
    )
    try:
        folder = snapshot_download(
            repository.name, repo_type="dataset", allow_patterns=["*.parquet"]
        )
    except (LocalEntryNotFoundError, HTTPError, OSError) as error:
        raise SourceError(
            f"{name}: {repository.name} is not in the hub's cache and cannot be fetched "
            f"({type(error).__name__}): {advice}"
        ) from error
    logger.info("%s: %s in %s", name, repository.name, folder)
    files = [file for file in storage.list_files(folder) if is_parquet(file.path)]
    source = ParquetSource(folder, files, place.options, name, split_column=False)
    found = source.rows_by_split()
    if found != repository.images:
        raise SourceError(
            f"{name}: {folder} holds {_counts(found)} images, expected {_counts(repository.images)}: {advice}"
        )
    return source


def _counts(images: dict[str, int]) -> str:
    return ", ".join(f"{count} {split}" for split, count in sorted(images.items()))
