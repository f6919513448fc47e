"""Caption files people have beside a folder of images: Flickr token files, Karpathy and COCO JSON, CSV and TSV."""

import csv
import io
import json
import posixpath
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from captioner.config import Split
from captioner.errors import SourceError
from captioner.sources.splits import split_called, split_in_name

_TOKEN_LINE = re.compile(r"^(?P<name>.+)#(?P<index>\d+)\t(?P<caption>.*)$")
_IMAGE_COLUMNS = ("image", "filename", "file_name", "image_name", "image_id")
_CAPTION_COLUMNS = ("caption", "comment", "raw", "text")


@dataclass(frozen=True)
class CaptionFile:
    """What a captions file says, by image name as written there."""

    captions: dict[str, list[str]]
    splits: dict[str, Split]
    """Split of each image, for formats that carry it."""


def looks_like_captions(name: str) -> bool:
    """Whether a file in a folder of images is probably its captions file."""
    base = posixpath.basename(name).lower()
    if ".lemma." in base:  # beside Flickr8k.token.txt, the same captions without inflections
        return False
    return base.endswith((".token.txt", ".token")) or bool(
        re.fullmatch(r"(captions?|results|dataset_\w+|captions_\w+)\.(txt|csv|tsv|json)", base)
    )


def merge_captions(files: dict[str, CaptionFile]) -> CaptionFile:
    """Several captions files that each name their split, as COCO's ``captions_train2014.json`` and its kin do.

    Raises:
        SourceError: a name says no split, or two files caption the same image.
    """
    merged = CaptionFile({}, {})
    for name, file in files.items():
        split = split_in_name(posixpath.basename(name))
        if split is None or len(file.splits) > 0:
            names = ", ".join(files)
            raise SourceError(
                f"several captions files ({names}): choose one with source-options.captions"
            )
        for image, captions in file.captions.items():
            if image in merged.captions:
                raise SourceError(f"{name}: captions for image {image}, which another file has too")
            merged.captions[image] = captions
            merged.splits[image] = split
    return merged


def parse_captions(name: str, data: bytes) -> CaptionFile:
    """Read a captions file; the format is told from its content.

    Raises:
        SourceError: it is none of the formats, or contradicts itself; the message names the line or image.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SourceError(f"{name}: not UTF-8 text: {error}") from error
    first = text.lstrip().partition("\n")[0].rstrip("\r")
    if first.startswith("{"):
        try:
            found = _json(name, json.loads(text))
        except (ValueError, RecursionError) as error:
            raise SourceError(f"{name}: not JSON: {error}") from error
    elif _TOKEN_LINE.match(first):
        found = _tokens(name, text)
    else:
        found = _table(name, text, first)
    for image, captions in found.captions.items():
        try:
            "".join([image, *captions]).encode()
        except (
            TypeError,
            UnicodeEncodeError,
        ) as error:  # JSON allows numbers, and halves of characters
            raise SourceError(f"{name}: image {image!r}: not text: {error}") from error
    return found


def _tokens(name: str, text: str) -> CaptionFile:
    """``name.jpg#0<TAB>text``, as Flickr8k.token.txt and results_20130124.token have it."""
    found: dict[str, dict[int, str]] = {}
    # Not splitlines(), which also breaks at separators that occur inside captions.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        match = _TOKEN_LINE.match(line.rstrip("\r"))
        if match is None:
            raise SourceError(f"{name}, line {number}: expected 'name.jpg#0<TAB>caption'")
        captions = found.setdefault(match["name"], {})
        index = int(match["index"])
        if index in captions:
            raise SourceError(f"{name}, line {number}: {match['name']}#{index} is given twice")
        captions[index] = match["caption"].strip()
    return CaptionFile(
        {
            image: [text for _, text in sorted(captions.items())]
            for image, captions in found.items()
        },
        {},
    )


def _json(name: str, raw: dict[str, Any]) -> CaptionFile:
    images = raw.get("images")
    if not isinstance(images, list):
        raise SourceError(f"{name}: no list 'images': neither Karpathy's nor COCO's format")
    try:
        if "annotations" in raw:
            return _coco(name, images, raw["annotations"])
        return _karpathy(name, images)
    except (KeyError, TypeError, AttributeError) as error:
        raise SourceError(f"{name}: neither Karpathy's nor COCO's format: {error!r}") from error


def _karpathy(name: str, images: Iterable[dict[str, Any]]) -> CaptionFile:
    """``dataset_flickr8k.json`` and its kin: images with ``filename``, ``split`` and ``sentences[].raw``."""
    captions: dict[str, list[str]] = {}
    splits: dict[str, Split] = {}
    for image in images:
        path = posixpath.join(image.get("filepath", ""), image["filename"])
        if path in captions:
            raise SourceError(f"{name}: image {path} is given twice")
        split = split_called(image["split"])
        if split is None:
            raise SourceError(f"{name}: image {path}: unknown split {image['split']!r}")
        captions[path] = [sentence["raw"].strip() for sentence in image["sentences"]]
        splits[path] = split
    return CaptionFile(captions, splits)


def _coco(
    name: str, images: Iterable[dict[str, Any]], annotations: Iterable[dict[str, Any]]
) -> CaptionFile:
    """COCO captions: ``images`` with id and file_name, ``annotations`` with image_id and caption."""
    names: dict[Any, str] = {}
    captions: dict[str, list[str]] = {}
    for image in images:
        if image["id"] in names:
            raise SourceError(f"{name}: image id {image['id']} is given twice")
        if image["file_name"] in captions:
            raise SourceError(f"{name}: image {image['file_name']} is given twice")
        names[image["id"]] = image["file_name"]
        captions[image["file_name"]] = []
    for annotation in annotations:
        if annotation["image_id"] not in names:
            raise SourceError(
                f"{name}: a caption for image id {annotation['image_id']}, which is not there"
            )
        captions[names[annotation["image_id"]]].append(annotation["caption"].strip())
    return CaptionFile(captions, {})


def _table(name: str, text: str, header: str) -> CaptionFile:
    """CSV or TSV with a header line; one caption a row."""
    delimiter = max("\t,|;", key=header.count)
    # Strict: a stray quotation mark is an error, not a caption that swallows the lines after it.
    reader = csv.DictReader(
        io.StringIO(text.lstrip(), newline=""),
        delimiter=delimiter,
        skipinitialspace=True,
        strict=True,
    )
    captions: dict[str, list[str]] = {}
    try:
        fields = {(field or "").strip().lower(): field for field in reader.fieldnames or []}
        image = next((fields[column] for column in _IMAGE_COLUMNS if column in fields), None)
        caption = next((fields[column] for column in _CAPTION_COLUMNS if column in fields), None)
        if image is None or caption is None:
            raise SourceError(
                f"{name}: not a captions file: expected Flickr token lines, Karpathy or COCO JSON, or a table with "
                f"columns image and caption; the first line is {header[:60]!r}"
            )
        for row in reader:
            # DictReader keeps surplus cells under None: an unquoted comma in the caption.
            if None in row or row[image] is None or row[caption] is None:
                raise SourceError(f"{name}, line {reader.line_num}: expected {len(fields)} columns")
            captions.setdefault(row[image].strip(), []).append(row[caption].strip())
    except csv.Error as error:
        raise SourceError(f"{name}, after line {reader.line_num}: {error}") from error
    return CaptionFile(captions, {})
