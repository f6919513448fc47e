"""The HTTP API and the page, over anything that captions: no Ray here.

FastAPI reads the annotations of the routes when they are made, so this module must not postpone them.
"""

from collections.abc import Callable
from importlib import resources
from typing import Annotated, Any, Protocol

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.routing import Route

from captioner import __version__
from captioner.config import DecodeConfig, ServeConfig
from captioner.serving.errors import ErrorCode, RequestError
from captioner.serving.guard import Guard, GuardSettings
from captioner.serving.messages import (
    CaptionParameters,
    CaptionResponse,
    ErrorResponse,
    Health,
    ModelCard,
    ModelList,
)
from captioner.serving.uploads import Upload, bad_parameter, read_upload

_PAGE = {
    "/": ("index.html", "text/html"),
    "/app.css": ("app.css", "text/css"),
    "/app.js": ("app.js", "text/javascript"),
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
            "attention": [{"word": "a", "weights": [[0.1, 0.2, 0.1], [0.2, 0.3, 0.1]]}],
            "attention_box": [0.0, 0.0, 1.0, 1.0],
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
_EVERYWHERE = (
    ErrorCode.UNAUTHORIZED,
    ErrorCode.UPLOAD_TIMEOUT,
    ErrorCode.REQUEST_TOO_LARGE,
    ErrorCode.OVERLOADED,
)
_UNHEALTHY = {"model": Health, "description": "A model does not caption (yet)"}
_OF_UPLOADS = (400, 413, 415, 422, 503)
_OTHERS = (ErrorCode.BAD_REQUEST, ErrorCode.NO_METRICS)
_FILES = {"type": "array", "items": {"type": "string", "format": "binary"}}
_FORM = {
    "schema": {
        "type": "object",
        "properties": {"image": _FILES},
        "required": ["image"],
        "description": "Every part with a file name is an image; other parts are parameters, as in the query.",
    }
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
        responses=_errors(*_EVERYWHERE),
    )
    app.add_middleware(Guard, settings=guard, reject=reject, observe=observe)

    async def answer_error(request: Request, error: Exception) -> Response:
        if isinstance(error, RequestValidationError):
            error = bad_parameter(error.errors())
        headers = {}
        if isinstance(error, HTTPException):
            if allow := (error.headers or {}).get("Allow"):
                # The Guard answers HEAD by what GET would get.
                headers["allow"] = ", ".join(
                    sorted({*allow.split(", "), *["HEAD"] * ("GET" in allow)})
                )
            error = RequestError.of_status(error.status_code)
        assert isinstance(error, RequestError)
        reject(error.code.code)
        return JSONResponse(error.body(), error.status, headers | error.headers())

    kinds: tuple[type[Exception], ...] = (RequestError, RequestValidationError, HTTPException)
    for kind in kinds:
        app.add_exception_handler(kind, answer_error)

    picture = {"schema": {"type": "string", "format": "binary"}}
    bodies = {"multipart/form-data": _FORM, **{f"image/{one}": picture for one in config.types}}

    @app.post(
        "/v1/captions",
        response_model=CaptionResponse,
        summary="Caption images",
        openapi_extra={"requestBody": {"required": True, "content": bodies}},
        responses={
            200: {"content": {"application/json": {"example": _EXAMPLE}}},
            **_errors(
                *_EVERYWHERE,
                *(one for one in ErrorCode if one.status in _OF_UPLOADS and one not in _OTHERS),
            ),
        },
    )
    async def captions(
        request: Request, parameters: Annotated[CaptionParameters, Query()]
    ) -> Response:
        upload = await read_upload(request, parameters, config)
        model = upload.parameters.model or next(iter(service.cards))
        if model not in service.cards:
            known = ", ".join(service.cards)
            problem = f"model: {model!r:.60} is not one of {known}"
            raise RequestError(ErrorCode.BAD_PARAMETER, problem)
        try:
            decode = upload.parameters.decode(service.cards[model].decode)
        except ValidationError as error:
            raise bad_parameter(error.errors()) from None
        cost = len(upload.images) * decode.work
        if cost > config.max_cost:
            problem = (
                f"the search takes {cost} steps, over the limit of {config.max_cost} (max_cost)"
            )
            raise RequestError(ErrorCode.TOO_COSTLY, problem)
        answer = await service.caption(model, upload, decode)
        # Built as that type already: FastAPI need not check it a second time.
        return Response(answer.model_dump_json(), media_type="application/json")

    @app.get("/v1/models", summary="List the models")
    async def models() -> ModelList:
        return ModelList(models=list(service.cards.values()))

    @app.get("/healthz", summary="Whether every model captions", responses={503: _UNHEALTHY})
    async def healthz() -> Response:
        found = await service.health()
        ready = all(state == "ok" for state in found.values())
        health = Health(status="ready" if ready else "not ready", models=found)
        return JSONResponse(health.model_dump(), 200 if ready else 503)

    @app.get(
        "/metrics",
        summary="Metrics for Prometheus",
        response_class=PlainTextResponse,
        responses=_errors(*_EVERYWHERE, ErrorCode.NO_METRICS),
    )
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(await service.metrics(), media_type="text/plain; version=0.0.4")

    files = resources.files("captioner.serving") / "page"
    for path, (name, media_type) in _PAGE.items():
        page = Response((files / name).read_bytes(), media_type=media_type)
        app.routes.append(Route(path, page, methods=["GET"]))
    return app


def _errors(*codes: ErrorCode) -> dict[int | str, dict[str, Any]]:
    """What the OpenAPI document says of them, by status."""
    found: dict[int | str, dict[str, Any]] = {}
    for code in codes:
        of_status = found.setdefault(
            code.status,
            {"model": ErrorResponse, "content": {"application/json": {"examples": {}}}},
        )
        example = {"value": RequestError(code).body()}
        of_status["content"]["application/json"]["examples"][code.code] = example
        if code.status == 503:
            of_status["headers"] = {
                "Retry-After": {"description": "Seconds to wait", "schema": {"type": "integer"}}
            }
    return found
