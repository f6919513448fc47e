"""Any data set that the library ``datasets`` reads: written as Parquet files once, and from then on read as those.

``hf:org/name`` is one of the Hugging Face hub, of its newest commit or that of ``@revision``; ``hf:path`` is a folder.
What ``save_to_disk`` wrote, and folders of Arrow files, are known without ``hf:``. The files are kept below
``$HF_HOME/captioner``, by the commit or by a digest of the folder's listing: a name whose files are there needs no
network any more. On several machines that must be a folder that all of them see.
"""

import hashlib
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

from captioner import storage
from captioner.config import SourceConfig
from captioner.errors import OutOfReachError, SourceError
from captioner.sources.image_files import is_image
from captioner.sources.listing import list_place
from captioner.sources.parquet import ParquetSource
from captioner.sources.parquet_files import is_parquet
from captioner.sources.place import Place

logger = logging.getLogger(__name__)

_PREFIX = "hf:"
_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
_ROWS_PER_GROUP = 64
_FILE_BYTES = 2**29
_SAVED = ("dataset_dict.json", "state.json")
OPTIONS = frozenset(
    (
        "captions",
        "image_column",
        "caption_columns",
        "split_column",
        "id_column",
        "subset",
        "split",
        "limit",
    )
)
"""Settings of ``SourceConfig`` that say something here."""


def open_place(place: Place) -> ParquetSource | None:
    """A data set that is named ``hf:``, or a folder that ``datasets`` wrote.

    Raises:
        SourceError: there is no such data set, or none that can be read.
        OutOfReachError: the hub does not answer, and the data set has not been fetched yet.
    """
    if place.spec.startswith(_PREFIX):
        name = place.spec.removeprefix(_PREFIX)
        if os.path.isdir(os.path.expanduser(name)):
            return _of_folder(place, os.path.abspath(os.path.expanduser(name)))
        return _of_hub(place, name)
    if place.files is None or not storage.is_local(place.uri):
        return None
    arrow = any(file.path.endswith(".arrow") for file in place.files)
    others = any(is_image(file.path) or is_parquet(file.path) for file in place.files)
    return _of_folder(place, place.uri) if arrow and not others else None


def _of_hub(place: Place, spec: str) -> ParquetSource:
    match = _NAME.fullmatch(spec)
    if match is None:
        raise SourceError(
            f"{place.spec}: expected hf:org/name or hf:org/name@revision, or a folder"
        )
    name, revision = match["name"], match["revision"] or "main"
    root = _cache() / name.replace("/", "--")
    reference = root / "refs" / f"{revision.replace('/', '--')}"
    if reference.is_file():
        commit = reference.read_text()
    else:
        commit = _commit_of(place.spec, name, revision)
    folder = root / _subset(commit, place.options)
    if not folder.is_dir():
        _write(folder, place.spec, name, place.options, revision=commit)
    if not reference.is_file():
        reference.parent.mkdir(parents=True, exist_ok=True)
        storage.write_bytes(str(reference), commit.encode())
    logger.info("%s: commit %s, in %s", place.spec, commit[:12], folder)
    return _opened(place, folder, f"{_PREFIX}{name}@{commit}")


def _of_folder(place: Place, path: str) -> ParquetSource:
    files, _ = list_place(path, place.options.exclude)
    listing = "".join(f"{file.path}:{file.size}:{file.mtime};" for file in files)
    digest = hashlib.sha256(f"{path};{listing}".encode()).hexdigest()[:40]
    folder = _cache() / "folders" / _subset(digest, place.options)
    if not folder.is_dir():
        _write(folder, place.spec, path, place.options)
    return _opened(place, folder, f"{_PREFIX}{path}")


def _opened(place: Place, folder: Path, name: str) -> ParquetSource:
    files = [file for file in storage.list_files(str(folder)) if is_parquet(file.path)]
    return ParquetSource(str(folder), files, place.options, name, captions=place.captions)


def _cache() -> Path:
    return Path(constants.HF_HOME) / "captioner"


def _subset(version: str, options: SourceConfig) -> str:
    return version if options.subset is None else f"{version}-{options.subset.replace('/', '--')}"


def _commit_of(spec: str, name: str, revision: str) -> str:
    try:
        commit = HfApi().dataset_info(name, revision=revision).sha
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise SourceError(
            f"{spec}: there is no such data set or revision on the hub, or this token (HF_TOKEN) may not see it"
        ) from error
    except (HTTPError, OSError, OfflineModeIsEnabled) as error:
        raise _away(spec, error) from error
    assert commit is not None
    return commit


def _away(spec: str, error: Exception) -> OutOfReachError:
    return OutOfReachError(
        f"{spec}: not in {_cache()} yet, and the hub cannot be reached ({type(error).__name__})"
    )


def _write(
    folder: Path, spec: str, path: str, options: SourceConfig, revision: str | None = None
) -> None:
    """Write all splits as ``<split>/00000.parquet`` ...; the folder appears when it is whole.

    Who is killed leaves whole files, after which the next one goes on; of two at once the other one waits.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(folder.with_name(f"{folder.name}.lock")):
        if folder.is_dir():
            return
        logger.info("%s: written as Parquet files to %s, once", spec, folder)
        try:
            # Late, for it takes a second or two.
            import datasets

            datasets.disable_progress_bars()
            for split, rows in _splits(datasets, path, options.subset, revision):
                _write_split(datasets, partial / split, rows)
        except SourceError:
            raise
        except (ConnectionError, TimeoutError, HTTPError, OfflineModeIsEnabled) as error:
            raise _away(spec, error) from error
        except Exception as error:  # of datasets, or of whatever it reads
            raise SourceError(f"{spec}: datasets cannot read it: {_line(error)}") from error
        partial.rename(folder)


def _splits(
    datasets: Any, path: str, subset: str | None, revision: str | None
) -> Iterator[tuple[str, Any]]:
    """Each split's name, and its rows, with images as they are encoded."""
    if any(os.path.isfile(os.path.join(path, name)) for name in _SAVED):
        loaded = datasets.load_from_disk(path)
    else:
        names = datasets.get_dataset_config_names(path, revision=revision)
        if subset is None and len(names) > 1 and "default" not in names:
            listed = ", ".join(names)
            raise SourceError(
                f"{path} has subsets: choose one with source-options.subset: {listed}"
            )
        loaded = datasets.load_dataset(path, subset, revision=revision, streaming=True)
    if not isinstance(loaded, dict):
        loaded = {str(loaded.split or "data"): loaded}
    for split, rows in loaded.items():
        for name, feature in (rows.features or {}).items():
            if isinstance(feature, datasets.Image):
                rows = rows.cast_column(name, datasets.Image(decode=False))
        yield str(split), rows


def _write_split(datasets: Any, folder: Path, rows: Any) -> None:
    """Write the rows that are not in the folder's files yet, with the encoded bytes of their images."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = sorted(folder.glob("*.parquet"))
    number = len(whole)
    if done := sum(pq.ParquetFile(file).metadata.num_rows for file in whole):
        rows = rows.skip(done)
    tables = (
        datasets.table.embed_table_storage(table)
        for table in rows.with_format("arrow").iter(batch_size=_ROWS_PER_GROUP)
    )
    for table in tables:
        unfinished = folder / "unfinished"
        with pq.ParquetWriter(unfinished, table.schema, write_page_checksum=True) as writer:
            size = 0
            while True:
                writer.write_table(table.cast(writer.schema))
                size += table.nbytes
                if size >= _FILE_BYTES or (table := next(tables, None)) is None:
                    break
        unfinished.rename(folder / f"{number:05}.parquet")
        number += 1


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__
