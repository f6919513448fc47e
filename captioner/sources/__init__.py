"""Sources of images and captions, opened by name, path or URI with ``open_source``."""

from importlib import import_module

from captioner.config import ImageLimits, SourceConfig
from captioner.errors import SourceError
from captioner.sources.base import Source
from captioner.sources.place import Place

# Modules with an ``open_place``, which gives the source, or None for a place of another kind. The first takes it.
KINDS = (
    "shapes",
    "hub",
    "hf",
    "parquet",
    "folder",
)


def open_source(
    spec: str,
    options: SourceConfig | None = None,
    *,
    limits: ImageLimits | None = None,
    captions: bool = True,
    output: str | None = None,
) -> Source:
    """The source that ``spec`` names.

    Args:
        spec: ``shapes``, ``flickr8k``, ``flickr30k``, or a path or URI of a folder of images, a single image, or
            Parquet files.
        limits: files over its byte limit are not read at all.
        captions: False passes over captions, and splits in files beside the images, whatever is wrong with them.
        output: where the run writes that the source is opened for. One that goes on has the images that it began with,
            whatever has come or gone since, and the captions and splits of today.

    Raises:
        SourceError: nothing is there, or it holds neither images nor Parquet files, or captions contradict the images.
    """
    place = Place(spec, options or SourceConfig(), limits or ImageLimits(), captions, output)
    for kind in KINDS:
        source: Source | None = import_module(f"{__name__}.{kind}").open_place(place)
        if source is not None:
            return source
    left_out = ", ".join(f"{count} {kind}" for kind, count in place.left_out.items())
    raise SourceError(
        f"{spec}: no images and no Parquet files" + (f" ({left_out})" if left_out else "")
    )
