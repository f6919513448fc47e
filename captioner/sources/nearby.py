"""The captions that lie beside a folder's images: in files of many, or in a text file beside each."""

import logging
import posixpath
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from captioner import storage
from captioner.config import SourceConfig
from captioner.errors import SourceError, StoreError
from captioner.sources.captions import CaptionFile, parse_captions, record_texts
from captioner.sources.columns import NO_CAPTIONS, column_flags
from captioner.sources.encodings import decode_text
from captioner.sources.matching import ImageNames
from captioner.sources.splits import split_in_name

logger = logging.getLogger(__name__)

TABLES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet")
SIDECARS = (".txt", ".caption", ".json")
# Text of other kinds is not looked at beyond this size.
_LARGEST_GUESS = 2**28
_NAMED = 3
# Flickr8k.token.txt has five captions of 2258277193_586949ec62.jpg.1, which is not among its images.
_NO_IMAGE = re.compile(r".+\.jpe?g\.\d+", re.I)


@dataclass
class Nearby:
    """Captions, and what files say of splits and ids, by the images' own paths."""

    captions: dict[str, list[str]] = field(default_factory=dict)
    splits: dict[str, str] = field(default_factory=dict)
    """As written."""
    ids: dict[str, str] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    """URIs of the files that this is from."""
    missing: int = 0
    """Captioned images that are not there."""


def find_captions(
    root: str, files: Sequence[storage.FileInfo], images: Sequence[str], options: SourceConfig
) -> Nearby:
    """Captions of images.

    Args:
        root: URI that the files' and images' paths are relative to.
        files: what lies there beside the images.
        images: their paths.

    Raises:
        SourceError: captions that were asked for, or are called so, cannot be read, or contradict the images.
    """
    found = Nearby()
    if options.captions == NO_CAPTIONS:
        return found
    names = ImageNames(images)
    if options.captions is not None:
        uri = storage.absolute(options.captions)
        below = uri.startswith(f"{root}/")
        path = uri.removeprefix(f"{root}/") if below else None
        problem = _add(found, _parse(uri, options), uri, path, names, options)
        if problem is not None:
            raise SourceError(problem)
        return found
    flags = column_flags(options)
    passed_over: list[str] = []
    # a.txt of a.jpg, and a.jpg.txt where there is an a.png, too.
    stems = {*map(_stem, images), *images}
    sidecars = [file for file in files if _is_sidecar(file.path, stems)]
    rest = [file for file in files if _stem(file.path) not in stems]
    for kind in (looks_like_captions, _is_table, _is_text):
        _add_all([file for file in rest if kind(file.path)], found, names, options, passed_over)
        rest = [file for file in rest if not kind(file.path)]
        if found.files:
            break
        if kind is _is_table and sidecars and not flags:
            _add_sidecars(found, sidecars, images, options)
            break
    if flags and not found.files:
        raise SourceError(
            passed_over[0] if passed_over else f"{flags[0]}: no captions file in {root}"
        )
    if passed_over:
        more = len(passed_over) - _NAMED
        logger.warning(
            "not captions: %s%s",
            "; ".join(passed_over[:_NAMED]),
            f"; and {more} more" if more > 0 else "",
        )
    return found


def looks_like_captions(path: str) -> bool:
    """Whether a file beside images is probably their captions file."""
    base = posixpath.basename(path).lower()
    if ".lemma." in base:  # beside Flickr8k.token.txt, the same captions without inflections
        return False
    return promises_captions(base) or bool(
        re.fullmatch(r"(metadata|results|dataset_\w+|\w*karpathy\w*|flickr\d+k_\w+)\.\w+", base)
        and base.endswith((*TABLES, ".txt"))
    )


def promises_captions(path: str) -> bool:
    """Whether a file's name leaves no doubt."""
    base = posixpath.basename(path).lower()
    return base.endswith((".token.txt", ".token")) or bool(
        re.fullmatch(
            r"(captions?|captions_\w+|\w+_captions)\.(txt|csv|tsv|json|jsonl|parquet)", base
        )
    )


def _is_table(path: str) -> bool:
    return path.lower().endswith(TABLES)


def _is_text(path: str) -> bool:
    return path.lower().endswith(".txt")


def _stem(path: str) -> str:
    return posixpath.splitext(path)[0]


def _is_sidecar(path: str, stems: set[str]) -> bool:
    return path.lower().endswith(SIDECARS) and _stem(path) in stems


def _parse(uri: str, options: SourceConfig) -> CaptionFile:
    try:
        return parse_captions(uri, storage.read_bytes(uri), options)
    except StoreError as error:
        raise SourceError(f"captions file {uri}: {error}") from error


def _add_all(
    files: Sequence[storage.FileInfo],
    found: Nearby,
    names: ImageNames,
    options: SourceConfig,
    passed_over: list[str],
) -> None:
    """Add what files say that are probably captions; why others are not goes to ``passed_over``."""

    def read(file: storage.FileInfo) -> CaptionFile | SourceError:
        if file.size > _LARGEST_GUESS and not looks_like_captions(file.path):
            return SourceError(f"{file.uri}: {file.size} bytes")
        try:
            return _parse(file.uri, options)
        except SourceError as error:
            return error

    with ThreadPoolExecutor(16) as pool:
        parsed = list(pool.map(read, files))
    absent: list[str] = []
    for file, content in zip(files, parsed, strict=True):
        if isinstance(content, CaptionFile):
            problem = _add(found, content, file.uri, file.path, names, options)
        else:
            problem = str(content)
        if problem is None:
            continue
        passed_over.append(problem)
        if isinstance(content, CaptionFile) and looks_like_captions(file.path):
            absent.append(problem)
        elif isinstance(content, SourceError) and promises_captions(file.path):
            raise SourceError(f"{problem}; source-options.captions none goes on without captions")
    # COCO's files are three, the folders of images that people have beside them often one.
    if absent and not found.files:
        raise SourceError(f"{absent[0]}; source-options.captions none goes on without captions")


def _add(
    found: Nearby,
    content: CaptionFile,
    uri: str,
    path: str | None,
    names: ImageNames,
    options: SourceConfig,
) -> str | None:
    """Add what one file says; or say why it has nothing to do with the images.

    Args:
        path: of the file, relative to the images' root; None outside of it.
    """
    wanted = [name for name, texts in content.captions.items() if texts or name in content.ids]
    listed = [name for name in content.captions if name not in set(wanted)]
    folder = None if path is None else posixpath.dirname(path)
    try:
        by_name, absent = names.match(wanted, folder)
        if listed:
            by_name |= names.match(listed, folder)[0]
    except SourceError as error:
        raise SourceError(f"{uri}: {error}") from error
    strange = [name for name in absent if _NO_IMAGE.fullmatch(name)]
    for name in strange:
        logger.warning("%s: captions of %s are left out: not the name of an image", uri, name)
    absent = [name for name in absent if name not in strange]
    if absent:
        some = ", ".join(absent[:_NAMED]) + (" ..." if len(absent) > _NAMED else "")
        told = f"{uri}: {len(absent)} of {len(wanted)} captioned pictures are not there ({some})"
        if not by_name:
            return told
        if options.missing == "error":
            raise SourceError(f"{told}: source-options.missing skip goes on without them")
        found.missing += len(absent)
    elif not by_name:
        return f"{uri}: captions of no picture"
    in_name = split_in_name(posixpath.basename(uri))
    for name, image in by_name.items():
        texts = content.captions[name]
        if image in found.captions and texts:
            raise SourceError(
                f"captions of {image} are in {' and in '.join([*found.files, uri])}: choose one with "
                "source-options.captions"
            )
        if texts:
            found.captions[image] = texts
        if split := content.splits.get(name) or in_name:
            found.splits[image] = split
        if name in content.ids:
            found.ids[image] = content.ids[name]
    found.files.append(uri)
    return None


def _add_sidecars(
    found: Nearby,
    sidecars: Sequence[storage.FileInfo],
    images: Sequence[str],
    options: SourceConfig,
) -> None:
    """``a.jpg.txt`` or else ``a.txt`` beside ``a.jpg``: a caption a line; else ``a.json``, a record. A line without a
    letter, such as the box of a detector, is none."""
    # What img2dataset writes has both.
    texted = {_stem(file.path) for file in sidecars if not _is_table(file.path)}
    sidecars = [f for f in sidecars if not _is_table(f.path) or _stem(f.path) not in texted]

    def read(file: storage.FileInfo) -> list[str]:
        data = storage.read_bytes(file.uri)
        if _is_table(file.path):
            texts = record_texts(file.uri, data, options)
        else:
            texts = decode_text(file.uri, data, options).split("\n")
        lines = (" ".join(line.split()) for line in texts)
        return [line for line in lines if any(map(str.isalpha, line))]

    with ThreadPoolExecutor(16) as pool:
        texts = list(pool.map(read, sidecars))
    by_stem: dict[str, list[str]] = {}
    for file, lines in zip(sidecars, texts, strict=True):
        if lines:
            by_stem.setdefault(_stem(file.path), []).extend(lines)
            found.files.append(file.uri)
    for image in images:
        if lines := by_stem.get(image) or by_stem.get(_stem(image), []):
            found.captions[image] = lines
