"""Sources of images and captions, opened by name, path or URI with ``open_source``."""

import logging
from collections.abc import Mapping
from importlib import import_module

from captioner import storage
from captioner.config import ImageLimits, SourceConfig
from captioner.errors import SourceError
from captioner.sources.base import Source
from captioner.sources.growing import Prefixed
from captioner.sources.place import Place

logger = logging.getLogger(__name__)

# What is no matter of the source's kind.
_ANY = {"id_prefix", "digest"}
# Modules with an ``open_place``, which gives the source, or None for a place of another kind. The first takes it. Each
# names the settings that it reads in ``OPTIONS``.
KINDS = (
    "shapes",
    "hub",
    "hf",
    "listed",
    "parquet",
    "shards",
    "folder",
)
_BUILT_IN = ("shapes", "hub")


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
        spec: ``shapes``, ``flickr8k``, ``flickr30k``, ``hf:org/name``, or a path or URI of a folder of images, a single
            image, Parquet files, tar shards, or a list of files.
        limits: files over its byte limit are not read at all.
        captions: False passes over captions, and splits in files beside the images, whatever is wrong with them.
        output: where the run writes that the source is opened for. One that goes on has the images that it began with,
            whatever has come or gone since, and the captions and splits of today.

    Raises:
        SourceError: nothing is there, or neither images, shards nor Parquet files; captions contradict the images; a
            setting says nothing to a source of its kind.
    """
    place = Place(spec, options or SourceConfig(), limits or ImageLimits(), captions, output)
    for kind in KINDS:
        module = import_module(f"{__name__}.{kind}")
        if kind in _BUILT_IN and spec in module.NAMES and storage.exists(spec):
            logger.warning(
                "%s is the data set of that name; what lies here under it is ./%s", spec, spec
            )
        source: Source | None = module.open_place(place)
        if source is None:
            continue
        if not source.num_images():
            raise SourceError(f"{spec}: no images{_told(source.left_out())}")
        for option, default in SourceConfig():
            if option not in module.OPTIONS | _ANY and getattr(place.options, option) != default:
                raise SourceError(
                    f"source-options.{option.replace('_', '-')} says nothing to a source of this kind: {spec}"
                )
        prefix = place.options.id_prefix
        return Prefixed(source, prefix) if prefix else source
    raise SourceError(f"{spec}: no images, no shards and no Parquet files{_told(place.left_out)}")


def _told(left_out: Mapping[str, int]) -> str:
    kinds = ", ".join(f"{count} {kind}" for kind, count in left_out.items())
    return f" ({kinds})" if kinds else ""
