"""Sources of images and captions, opened by name, path or URI with ``open_source``."""

import posixpath

from captioner import storage
from captioner.artifacts.output import CLAIM
from captioner.config import ImageLimits, SourceConfig
from captioner.errors import SourceError, StoreError
from captioner.sources.base import Source

HUB_NAMES = ("flickr8k", "flickr30k")


def open_source(
    spec: str,
    options: SourceConfig | None = None,
    *,
    limits: ImageLimits | None = None,
    captions: bool = True,
) -> Source:
    """The source that ``spec`` names.

    Passed over are hidden files (a name or directory that begins with a dot), directories that begin with ``_``, and
    directories that a job of this package wrote.

    Args:
        spec: ``shapes``, ``flickr8k``, ``flickr30k``, or a path or URI of a folder of images, a single image, or
            Parquet files.
        limits: files over its byte limit are not read at all.
        captions: False passes over captions, and splits in files beside the images, whatever is wrong with them.

    Raises:
        SourceError: nothing is there, or it holds neither images nor Parquet files, or captions contradict the images.
    """
    options, limits = options or SourceConfig(), limits or ImageLimits()
    if spec == "shapes":
        from captioner.sources.shapes import ShapesSource

        return ShapesSource(options.shapes, options.limit)
    if spec in HUB_NAMES:
        from captioner.sources.hub import open_hub

        return open_hub(spec, options)
    from captioner.sources.folder import FolderSource, is_image
    from captioner.sources.parquet import ParquetSource
    from captioner.sources.parquet_files import is_parquet

    # A local path says each name as it is; in a file:// URI '#', '%' and '?' would have to be escaped.
    uri = storage.absolute(storage.resolve(spec)[1] if spec.startswith("file://") else spec)
    files, hidden = _list(spec, uri)
    if files is None:
        if is_parquet(uri):
            return ParquetSource(uri, None, options, captions=captions)
        return FolderSource(uri, None, options, limits, captions=captions)
    tables = [file for file in files if is_parquet(file.path)]
    images = [file for file in files if is_image(file.path)]
    if tables and images:
        raise SourceError(
            f"{spec}: holds both Parquet files ({tables[0].path}, ...) and images ({images[0].path}, ...): "
            "give the folder of one kind"
        )
    if not tables and not images:
        raise SourceError(f"{spec}: no images and no Parquet files")
    if tables:
        return ParquetSource(uri, tables, options, captions=captions)
    return FolderSource(uri, files, options, limits, captions=captions, hidden=hidden)


def _list(spec: str, uri: str) -> tuple[list[storage.FileInfo] | None, int]:
    """The visible files of a directory, None when ``uri`` is a file; and how many others there are."""
    try:
        if not storage.exists(uri):
            raise SourceError(
                f"{spec}: no such file or directory, nor one of shapes, {', '.join(HUB_NAMES)}"
            )
        if not storage.is_directory(uri):
            return None, 0
        files = storage.list_files(uri)
    except UnicodeDecodeError as error:
        raise SourceError(f"{spec}: holds a file whose name is not UTF-8: rename it") from error
    except (StoreError, OSError) as error:
        raise SourceError(f"{spec}: {' '.join(str(error).split())}") from error
    written = [
        posixpath.dirname(file.path) for file in files if posixpath.basename(file.path) == CLAIM
    ]
    if "" in written:
        raise SourceError(f"{spec}: written by a job of this package: not a source of images")
    inside = tuple(f"{directory}/" for directory in written)
    visible = [f for f in files if _is_visible(f.path) and not f.path.startswith(inside)]
    return visible, len(files) - len(visible)


def _is_visible(path: str) -> bool:
    *directories, name = path.split("/")
    # Cameras name pictures _DSC0001.JPG: "_" hides directories only (_temporary, _delta_log).
    return not (
        name.startswith(".") or any(directory.startswith((".", "_")) for directory in directories)
    )
