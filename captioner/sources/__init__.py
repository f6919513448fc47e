"""Sources of images and captions, opened by name, path or URI with ``open_source``."""

from captioner import storage
from captioner.config import ImageLimits, SourceConfig
from captioner.errors import SourceError
from captioner.sources.base import Source

HUB_NAMES = ("flickr8k", "flickr30k")


def open_source(
    spec: str, options: SourceConfig | None = None, *, limits: ImageLimits | None = None
) -> Source:
    """The source that ``spec`` names.

    Args:
        spec: ``shapes``, ``flickr8k``, ``flickr30k``, or a path or URI of a folder of images, a single image, or
            Parquet files.
        limits: files over its byte limit are not read at all.

    Raises:
        SourceError: nothing is there, or it holds neither images nor Parquet files.
    """
    options, limits = options or SourceConfig(), limits or ImageLimits()
    if spec == "shapes":
        from captioner.sources.shapes import ShapesSource

        return ShapesSource(options.shapes, options.limit)
    if spec in HUB_NAMES:
        from captioner.sources.hub import open_hub

        return open_hub(spec, options)
    uri = storage.absolute(spec)
    if not storage.exists(uri):
        raise SourceError(f"{spec}: no such file or directory, nor one of shapes, {', '.join(HUB_NAMES)}")
    files = storage.list_files(uri) if storage.is_directory(uri) else []
    if uri.endswith(".parquet") or any(file.path.endswith(".parquet") for file in files):
        from captioner.sources.parquet import ParquetSource

        return ParquetSource(uri, options)
    from captioner.sources.folder import FolderSource

    return FolderSource(uri, files, options, limits)


def read_image(uri: str) -> bytes:
    """The encoded image behind a ``uri`` column.

    Raises:
        SourceError, StoreError: it is no longer there.
    """
    if uri.startswith("shapes://"):
        from captioner.sources.shapes import read_scene

        return read_scene(uri)
    if ".parquet#" in uri:
        from captioner.sources.parquet import read_cell

        return read_cell(uri)
    return storage.read_bytes(uri)
