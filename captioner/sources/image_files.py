"""Which files are pictures: by their suffix or by their content."""

import posixpath
from concurrent.futures import ThreadPoolExecutor

from captioner import storage
from captioner.errors import StoreError
from captioner.images.load import HEIF_EXTRA, has_loader, sniff_format
from captioner.sources.columns import IMAGE_SUFFIX
from captioner.sources.nearby import SIDECARS, TABLES
from captioner.sources.place import suffix_of

# Of what lies among pictures and is none, whatever it holds.
_NO_PICTURES = (
    *TABLES, *SIDECARS, ".tar", ".md", ".html", ".xml", ".yaml", ".yml", ".py", ".pdf", ".zip", ".mp4", ".mov",
)  # fmt: skip


def is_image(path: str) -> bool:
    """Whether a file is taken for a picture that can be loaded here, by its suffix."""
    base = posixpath.basename(path)
    return IMAGE_SUFFIX.fullmatch(base) is not None and (has_loader("HEIF") or not _is_heif(base))


def _is_heif(path: str) -> bool:
    return path.lower().endswith((".heic", ".heif", ".hif"))


def is_known(path: str) -> bool:
    """Whether a suffix says what a file is, and what it says is right."""
    return IMAGE_SUFFIX.fullmatch(path) is not None or path.lower().endswith(_NO_PICTURES)


def sniff(files: list[storage.FileInfo]) -> list[storage.FileInfo]:
    """Those whose content is a picture's that can be loaded here; a local file that its owner keeps to himself, or that
    has gone, is none."""

    def is_picture(file: storage.FileInfo) -> bool:
        try:
            with storage.reading(file.uri), storage.open_input(file.uri) as handle:
                found = sniff_format(handle.read(64))
        except StoreError:
            if not storage.is_local(file.uri):
                raise
            return False
        return found is not None and (found != "image/heic" or has_loader("HEIF"))

    with ThreadPoolExecutor(16) as pool:
        return [file for file, fine in zip(files, pool.map(is_picture, files), strict=True) if fine]


def kind_of_file(path: str) -> str:
    """What a file that is left out is counted as."""
    suffix = suffix_of(path)
    return f"{suffix} (needs the extra {HEIF_EXTRA})" if _is_heif(path) else suffix
