"""Bytes of text files, of whatever encoding people have, as text."""

import codecs

from captioner.config import SourceConfig
from captioner.errors import SourceError

_BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    # Before UTF-16, whose mark begins it.
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def decode_text(name: str, data: bytes, options: SourceConfig) -> str:
    """Text with ``\\n`` at the ends of its lines. A byte-order mark decides its encoding; else it is UTF-8, or what the
    setting says.

    Raises:
        SourceError: it is not text of that encoding, or there is no such encoding.
    """
    marked = next(
        (_BYTE_ORDER_MARKS[mark] for mark in _BYTE_ORDER_MARKS if data.startswith(mark)), None
    )
    encodings = [marked or options.encoding or "utf-8"]
    if marked is None and not data.isascii() and b"\0" not in data:
        # Of several files some may be what all should be; hardly any text of another encoding happens to be UTF-8.
        encodings = list(dict.fromkeys(["utf-8", *encodings]))
    for encoding in encodings:
        try:
            text = data.decode(encoding)
            break
        except UnicodeDecodeError as error:
            if encoding == encodings[-1]:
                raise SourceError(
                    f"{name}: not {encoding} text ({error.reason} at byte {error.start}); source-options.encoding "
                    "names another, such as latin-1"
                ) from error
        except (LookupError, UnicodeError) as error:
            raise SourceError(
                f"source-options.encoding: {encoding!r} is no encoding of text"
            ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")
