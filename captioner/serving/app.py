"""The HTTP API and the page, over anything that captions: no Ray here.

FastAPI reads the annotations of the routes when they are made, so this module must not postpone them.
"""

from collections.abc import Awaitable, Callable
from importlib import resources
from typing import Annotated, Any, Protocol

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from captioner import __version__
from captioner.config import DecodeConfig, ServeConfig
from captioner.serving.messages import (
    CaptionParameters,
    CaptionResponse,
    ErrorResponse,
    Health,
    ModelCard,
    ModelList,
    RequestError,
)
from captioner.serving.security import Guard, GuardSettings
from captioner.serving.uploads import Upload, bad_parameter, of_image, read_upload

PAGE = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/app.css": ("app.css", "text/css; charset=utf-8"),
    "/app.js": ("app.js", "text/javascript; charset=utf-8"),
}
_EXAMPLE = {
    "model": "flickr8k",
    "version": "43f104a9db08",
    "captions": [
        {
            "name": "dog.jpg",
            "caption": "a dog runs on the grass",
            "log_prob": -6.1,
            "probability": 0.0022,
            "alternatives": [
                {"caption": "a brown dog runs", "log_prob": -6.4, "probability": 0.0017}
            ],
            "attention": [{"word": "a", "weights": [[0.0204] * 7] * 7}],
        }
    ],
    "timing": {
        "load_ms": 4.1,
        "wait_ms": 0.2,
        "model_ms": 31.5,
        "total_ms": 38.0,
        "batch_size": 1,
    },
}
_ERRORS = {
    400: ("not_an_image", "not an image: send JPEG, PNG, WEBP, GIF"),
    401: ("unauthorized", "send a valid token: Authorization: Bearer TOKEN"),
    408: ("upload_timeout", "the request did not arrive in time: send less, or faster"),
    413: ("image_too_large", "20000000 bytes, over the limit of 16777216: send a smaller picture"),
    415: ("type_not_allowed", "images of type bmp are not accepted: send JPEG, PNG, WEBP, GIF"),
    422: ("bad_parameter", "beam_size: Input should be greater than or equal to 1 (got '0')"),
    503: ("overloaded", "the service is busy: try again after the seconds in Retry-After"),
}
_FILES = {"type": "array", "items": {"type": "string", "format": "binary"}}
_BODY = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "properties": {"image": _FILES},
                "required": ["image"],
                "description": "Every part with a file name is an image; other parts are parameters, as in the query.",
            }
        },
        **{
            f"image/{kind}": {"schema": {"type": "string", "format": "binary"}}
            for kind in ("jpeg", "png", "webp", "gif")
        },
    },
}


class CaptionService(Protocol):
    """What the API needs."""

    cards: dict[str, ModelCard]
    """Models by name, the default first."""

    async def caption(self, model: str, upload: Upload, decode: DecodeConfig) -> CaptionResponse:
        """Captions of the images of a request.

        Raises:
            RequestError: one of them is refused, or there is no capacity.
        """
        ...

    async def health(self) -> dict[str, str]:
        """Models by name: ``ok``, or why they do not caption."""
        ...

    async def metrics(self) -> str:
        """In the text format of Prometheus."""
        ...


def create_app(
    service: CaptionService,
    config: ServeConfig,
    guard: GuardSettings,
    *,
    reject: Callable[[str], None],
    observe: Callable[[str, str, int, float], None],
) -> FastAPI:
    """The application, behind a ``Guard``."""
    app = FastAPI(
        title="captioner",
        version=__version__,
        summary="Captions for images.",
        # FastAPI's own pages of documentation load scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
        responses={status: _error(status) for status in (401, 408, 413, 503)},
    )
    app.add_middleware(Guard, settings=guard, reject=reject, observe=observe)

    async def answer_error(request: Request, error: Exception) -> Response:
        found = _as_request_error(error)
        if found.status not in (404, 405):
            reject(found.code)
        return JSONResponse(found.body(), found.status)

    kinds: tuple[type[Exception], ...] = (RequestError, RequestValidationError, HTTPException)
    for kind in kinds:
        app.add_exception_handler(kind, answer_error)

    @app.post(
        "/v1/captions",
        response_model=CaptionResponse,
        summary="Caption images",
        openapi_extra={"requestBody": _BODY},
        responses={
            200: {"content": {"application/json": {"example": _EXAMPLE}}},
            **{status: _error(status) for status in (400, 415, 422)},
        },
    )
    async def captions(
        request: Request, parameters: Annotated[CaptionParameters, Query()]
    ) -> Response:
        upload = await read_upload(request, parameters, config)
        model = upload.parameters.model or next(iter(service.cards))
        if model not in service.cards:
            known = ", ".join(service.cards)
            raise RequestError(422, "bad_parameter", f"model: {model!r:.60} is not one of {known}")
        try:
            decode = upload.parameters.decode(service.cards[model].decode)
        except ValidationError as error:
            raise bad_parameter(error.errors()) from None
        answer = await service.caption(model, upload, decode)
        # Built as that type already: FastAPI need not check it a second time.
        return Response(answer.model_dump_json(), media_type="application/json")

    @app.get("/v1/models", summary="List the models")
    async def models() -> ModelList:
        return ModelList(models=list(service.cards.values()))

    @app.get("/healthz", summary="Whether every model captions", responses={503: _unhealthy()})
    async def healthz() -> Response:
        found = await service.health()
        ready = all(state == "ok" for state in found.values())
        health = Health(status="ready" if ready else "not ready", models=found)
        return JSONResponse(health.model_dump(), 200 if ready else 503)

    @app.get("/metrics", summary="Metrics for Prometheus", response_class=PlainTextResponse)
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(await service.metrics(), media_type="text/plain; version=0.0.4")

    files = resources.files("captioner.serving") / "page"
    for path, (name, media_type) in PAGE.items():
        content = (files / name).read_bytes()
        app.get(path, include_in_schema=False)(_static(content, media_type))
    return app


def refuse(status: int, code: str, message: str, position: int, upload: Upload) -> RequestError:
    """A replica's refusal of one image, as the error of its request."""
    return of_image(RequestError(status, code, message), position, upload.names)


def _static(content: bytes, media_type: str) -> Callable[[], Awaitable[Response]]:
    async def answer() -> Response:
        return Response(content, media_type=media_type)

    return answer


def _as_request_error(error: Exception) -> RequestError:
    if isinstance(error, RequestError):
        return error
    if isinstance(error, RequestValidationError):
        return bad_parameter(error.errors())
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return RequestError(404, "not_found", "no such path; /openapi.json lists them")
    if error.status_code == 405:
        message = "this path does not take that method; see /openapi.json"
        return RequestError(405, "method_not_allowed", message)
    return RequestError(error.status_code, "error", str(error.detail))


def _error(status: int) -> dict[str, Any]:
    code, message = _ERRORS[status]
    example = {"error": {"code": code, "message": message}}
    found: dict[str, Any] = {
        "model": ErrorResponse,
        "content": {"application/json": {"example": example}},
    }
    if status == 503:
        found["headers"] = {
            "Retry-After": {"description": "Seconds to wait", "schema": {"type": "integer"}}
        }
    return found


def _unhealthy() -> dict[str, Any]:
    return {"model": Health, "description": "A model does not caption (yet)"}
