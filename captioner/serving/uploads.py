"""The images and parameters of a request, checked as far as that goes without loading them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from email.message import Message
from typing import Any

from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from captioner.config import ServeConfig
from captioner.images.load import sniff_format
from captioner.serving.errors import ErrorCode, RequestError
from captioner.serving.messages import CaptionParameters

# Pictures by content that are none of ours, to tell "another type" from "not a picture": signature and its place.
_OTHER_TYPES = {
    "MP4": (4, b"ftyp"),
    "JPEG XL": (0, b"\xff\x0a"),
    "JPEG XL container": (4, b"JXL "),
    "JPEG 2000": (4, b"jP  "),
    "Photoshop": (0, b"8BPS"),
    "icon": (0, b"\0\0\1\0"),
    "SVG": (0, b"<svg"),
    "XML": (0, b"<?xml"),
    "PDF": (0, b"%PDF-"),
}

_FILE_NAME = re.compile(rb'(?i);\s*filename[*\d]*\s*=\s*("(?:\\.|[^"\\])*"|[^;]*)')


@dataclass(frozen=True)
class Upload:
    """A request's images, all of accepted types and sizes."""

    images: list[bytes]
    names: list[str | None]
    parameters: CaptionParameters


async def read_upload(
    request: Request, parameters: CaptionParameters, config: ServeConfig
) -> Upload:
    """Images from a multipart form (every part with a file), or the body itself.

    The form's other fields are parameters and go before those of the query.

    Raises:
        RequestError: there is no image, or one is too large or of another type, or a field is wrong.
    """
    images: list[bytes] = []
    names: list[str | None] = []
    if request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        fields: dict[str, str] = {}
        for field, value in await _parse(request, config):
            if isinstance(value, UploadFile):
                images.append(await value.read())
                names.append(value.filename or None)
                await value.close()  # it holds the same bytes
            else:
                fields[field] = value
        parameters = _merge(parameters, fields)
    elif body := await request.body():
        images, names = [body], [None]
    if not images:
        raise RequestError(ErrorCode.NO_IMAGE)
    for position, data in enumerate(images):
        try:
            _check(data, config)
        except RequestError as error:
            raise error.of_image(position, names) from None
    return Upload(images, names, parameters)


class _FormParser(MultiPartParser):
    """Also takes names of files as ``filename*`` has them (RFC 5987, RFC 2231), which go before the plain ones."""

    def on_part_begin(self) -> None:
        super().on_part_begin()
        # Forms are UTF-8 (RFC 7578). Of Python's codecs, which a client would choose from, some give what is no text.
        self._charset = "utf-8"

    def on_headers_finished(self) -> None:
        part = self._current_part
        given = part.content_disposition or b""
        if b"filename*" in given.lower() and (name := _extended_name(given)) is not None:
            plain = re.sub(r'["\\\x00-\x1f]', "_", name).encode("utf-8", "replace")
            part.content_disposition = _FILE_NAME.sub(b"", given) + b'; filename="%s"' % plain
        super().on_headers_finished()


def _extended_name(disposition: bytes) -> str | None:
    """
    Raises:
        MultiPartException: it is damaged.
    """
    message = Message()
    message["content-disposition"] = disposition.decode("latin-1")
    name = None
    try:
        for key, value in message.get_params([], "content-disposition"):
            # Those with a charset come last.
            if key.lower() != "filename":
                continue
            if isinstance(value, str):
                name = value.encode("latin-1").decode("utf-8", "replace")
            else:
                charset, _, text = value
                name = text.encode("latin-1").decode(charset or "utf-8")
    except (LookupError, ValueError, TypeError):  # the last where pieces have no numbers
        raise MultiPartException("filename* is damaged") from None
    return name


async def _parse(request: Request, config: ServeConfig) -> list[tuple[str, UploadFile | str]]:
    most = config.max_images
    parser = _FormParser(
        request.headers, request.stream(), max_files=most, max_fields=100, max_part_size=2**16
    )
    # The body is in memory already and its size bounded: no detour by files on disk.
    parser.spool_max_size = config.max_request_bytes
    try:
        return (await parser.parse()).multi_items()
    except (MultiPartException, HTTPException, KeyError, UnicodeDecodeError) as error:
        if parser._current_files > most:
            problem = f"more images than the limit of {most} (max_images)"
            raise RequestError(ErrorCode.TOO_MANY_IMAGES, problem) from None
        reason = getattr(error, "message", "") or "it cannot be read"
        problem = f"the multipart form is damaged: {reason}"
        raise RequestError(ErrorCode.BAD_FORM, problem) from None


def _merge(parameters: CaptionParameters, fields: dict[str, str]) -> CaptionParameters:
    try:
        return CaptionParameters.model_validate(parameters.model_dump(exclude_unset=True) | fields)
    except ValidationError as error:
        raise bad_parameter(error.errors()) from None


def bad_parameter(errors: Sequence[Any]) -> RequestError:
    """422 that names each field, its value and what is allowed, from pydantic's errors."""
    lines = []
    for item in errors:
        place = [str(part) for part in item["loc"] if part not in ("query", "body")]
        text = str(item["msg"]).removeprefix("Value error, ")
        value = "" if isinstance(item.get("input"), dict) else f" (got {item.get('input')!r:.60})"
        lines.append(f"{'.'.join(place)}: {text}{value}" if place else f"{text}{value}")
    return RequestError(ErrorCode.BAD_PARAMETER, "; ".join(lines))


def _check(data: bytes, config: ServeConfig) -> None:
    if not data:
        raise RequestError(ErrorCode.NOT_AN_IMAGE, "empty file", "send a picture")
    if len(data) > config.limits.max_bytes:
        problem = f"{len(data)} bytes, over the limit of {config.limits.max_bytes}"
        raise RequestError(ErrorCode.IMAGE_TOO_LARGE, problem)
    advice = f"send {', '.join(kind.upper() for kind in config.types)}"
    found = sniff_format(data)
    kind = found.removeprefix("image/") if found else _other_type(data)
    if kind is None:
        raise RequestError(ErrorCode.NOT_AN_IMAGE, advice=advice)
    if kind not in config.types:
        problem = f"images of type {kind} are not accepted"
        raise RequestError(ErrorCode.TYPE_NOT_ALLOWED, problem, advice)


def _other_type(data: bytes) -> str | None:
    for name, (place, signature) in _OTHER_TYPES.items():
        if data[place : place + len(signature)] == signature:
            return name
    return None
