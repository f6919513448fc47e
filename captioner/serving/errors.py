"""The one table of what clients are told when something is wrong: status, code, text and advice."""

import math
from enum import Enum
from typing import Any


class ErrorCode(Enum):
    """Status, what is wrong, what to do. The name, in lower case, is the code for programs and does not change.

    An answer may be more exact about what is wrong; the text here stands in the others, and in the OpenAPI document.
    """

    NO_IMAGE = 400, "no image in the request", "send its bytes, or a multipart form with files"
    NOT_AN_IMAGE = 400, "not an image", "send JPEG, PNG, WEBP, GIF, AVIF"
    BAD_FORM = 400, "the multipart form is damaged", "send one part for every image"
    BAD_REQUEST = 400, "this is no HTTP request", "send HTTP/1.1"
    UNAUTHORIZED = 401, "no valid token", "send Authorization: Bearer TOKEN"
    NOT_FOUND = 404, "no such path", "/openapi.json lists them"
    METHOD_NOT_ALLOWED = 405, "this path does not take that method", "see /openapi.json"
    UPLOAD_TIMEOUT = 408, "the request did not arrive in time", "send less, or faster"
    REQUEST_TOO_LARGE = 413, "the request is too large", "send fewer or smaller images"
    IMAGE_TOO_LARGE = 413, "20000000 bytes, over the limit of 16777216", "send a smaller picture"
    TYPE_NOT_ALLOWED = 415, "images of type bmp are not accepted", "send JPEG, PNG, WEBP, GIF, AVIF"
    BAD_PARAMETER = 422, "beam_size: Input should be greater than or equal to 1 (got '0')", ""
    TOO_MANY_IMAGES = 422, "more images than the limit of 16 (max_images)", "send fewer at once"
    TOO_COSTLY = (
        422,
        "the search takes 600000 steps, over the limit of 200000 (max_cost)",
        "ask for fewer images, beams, captions or words",
    )
    HEADERS_TOO_LARGE = 431, "the headers are too large", "send fewer of them, or shorter ones"
    ERROR = 500, "the request failed", "try again"
    OVERLOADED = (
        503,
        "the service is busy or starting",
        "try again after the seconds in Retry-After",
    )
    REPLICA_LOST = (
        503,
        "the process that loaded these images ended",
        "send them again once, one image a request",
    )
    NO_METRICS = 503, "the metrics of Ray's nodes cannot be read", "try again"

    def __init__(self, status: int, problem: str, advice: str):
        self.status, self.problem, self.advice = status, problem, advice

    @property
    def code(self) -> str:
        return self.name.lower()


class RequestError(Exception):
    """A request that gets an error for an answer; replicas of a model return it to the API's."""

    def __init__(
        self,
        code: ErrorCode,
        problem: str = "",
        advice: str = "",
        status: int = 0,
        retry_after_s: float = 0.0,
    ):
        """
        Args:
            problem: what is wrong, advice: what to do, status: of HTTP; default: as the table has them.
            retry_after_s: with 503, when there will be room; default: as the settings say.
        """
        # All of them, or it could not be pickled.
        super().__init__(code, problem, advice, status, retry_after_s)
        self.code, self.status, self.retry_after_s = code, status or code.status, retry_after_s
        self._problem, self._advice = problem or code.problem, advice or code.advice

    @classmethod
    def of_status(cls, status: int) -> "RequestError":
        """The error behind a bare status, as Ray Serve's proxy and Starlette answer."""
        code = _OF_STATUS.get(status, ErrorCode.ERROR)
        return cls(code, status=status if code is ErrorCode.ERROR else 0)

    def of_image(self, position: int, names: list[str | None]) -> "RequestError":
        """The same error saying which of several images it is about."""
        if len(names) == 1:
            return self
        name = f" ({names[position]})" if names[position] else ""
        problem = f"image {position + 1} of {len(names)}{name}: {self._problem}"
        return RequestError(self.code, problem, self._advice)

    def __str__(self) -> str:
        return f"{self._problem}: {self._advice}" if self._advice else self._problem

    def body(self) -> dict[str, Any]:
        """As in ``ErrorResponse``."""
        return {"error": {"code": self.code.code, "message": str(self)}}

    def headers(self) -> dict[str, str]:
        """``Retry-After`` where it is known when to come back."""
        return {"retry-after": str(math.ceil(self.retry_after_s))} if self.retry_after_s > 0 else {}


_OF_STATUS = {
    404: ErrorCode.NOT_FOUND,
    405: ErrorCode.METHOD_NOT_ALLOWED,
    # Of Ray Serve's proxy when no replica of the API answered: nothing that the client was too slow for.
    408: ErrorCode.OVERLOADED,
    503: ErrorCode.OVERLOADED,
}
