"""Settings of the caption service."""

import re
from typing import Annotated, Literal

import tyro
from pydantic import Field, model_validator

from captioner.config.decoding import DecodeOverrides
from captioner.config.parts import Config, ImageLimits, Positive

Seconds = Annotated[float, Field(gt=0.0)]
ImageType = Literal["jpeg", "png", "webp", "gif", "bmp", "tiff", "avif", "heic"]

_NAMED = re.compile(r"(?P<name>[\w.-]+)=(?P<uri>.+)")


class Served(Config):
    """What is served, and where."""

    model: Annotated[tuple[str, ...], Field(min_length=1), tyro.conf.UseAppendAction]
    """Model directory (path or URI), or NAME=URI; repeat the flag to serve several. The first is the default."""
    host: str = "127.0.0.1"
    """Address to listen on. The default is this machine alone; 0.0.0.0 opens the service to the network."""
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    """Port to listen on."""

    @model_validator(mode="after")
    def _names_differ(self) -> "Served":
        names = [name for name, _ in self._named()]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"model: two are called {name!r}; name them with NAME=URI")
        return self

    @property
    def models(self) -> dict[str, str]:
        """URIs by name, the default first."""
        return dict(self._named())

    def _named(self) -> list[tuple[str, str]]:
        found = []
        for text in self.model:
            match = _NAMED.fullmatch(text)
            uri = match["uri"] if match else text
            last = uri.rstrip("/").rpartition("/")[2]
            # hf:org/name@revision
            last = last.partition("@")[0] if uri.startswith("hf:") else last
            name = match["name"] if match else last
            found.append((re.sub(r"[^\w.-]", "_", name) or "model", uri))
        return found


class UploadBounds(Config):
    """What clients may send and hold."""

    max_request_bytes: Positive = 64 * 2**20
    """Largest request body, in bytes."""
    max_uploads: Positive = 256
    """Requests that one HTTP replica works on at once; beyond it clients get 503."""
    max_upload_bytes: Positive = 512 * 2**20
    """Bytes of request bodies that one HTTP replica holds at once; beyond it clients get 503."""
    upload_timeout_s: Seconds = 20.0
    """Longest time a client may take to send its request, in seconds."""
    retry_after_s: Positive = 1
    """What clients that get 503 are told to wait, in seconds."""


class ServeConfig(UploadBounds, Served):
    """Serve models over HTTP: an API and a web page."""

    decode: DecodeOverrides = DecodeOverrides()
    """What a request that says nothing else gets, over each model's own search."""
    limits: ImageLimits = ImageLimits(max_bytes=16 * 2**20)
    types: Annotated[tuple[ImageType, ...], Field(min_length=1)] = (
        "jpeg",
        "png",
        "webp",
        "gif",
        "avif",
    )
    """Accepted image types, recognised by content; heic takes the extra heif."""
    max_images: Positive = 16
    """Most images in one request."""
    request_timeout_s: Seconds = 30.0
    """Longest time to the answer once a request is complete, in seconds; then the client gets 503."""
    max_queued: Positive = 128
    """Requests that wait for a model replica, per HTTP replica; beyond it clients get 503."""
    max_batch_size: Positive = 32
    """Most images in one forward pass."""
    min_replicas: Positive = 1
    """Fewest replicas of each model."""
    max_replicas: Positive = 1
    """Most replicas of each model; between the two Ray Serve follows the load."""
    target_ongoing_requests: Annotated[float, Field(gt=0.0)] | None = None
    """Requests per model replica that autoscaling aims at; default: max_batch_size."""
    http_replicas: Positive = 1
    """Replicas of the HTTP API."""
    gpus_per_replica: Annotated[float, Field(ge=0.0)] | None = None
    """GPUs of one model replica; default: half of one where the cluster has any, so that a new version finds room."""
    cpus_per_replica: Annotated[float, Field(gt=0.0)] | None = None
    """CPUs one model replica reserves; default: at most 1, less where the cluster could not hold a second version."""
    threads: Positive | None = None
    """Threads of one model replica on CPU; default: the cores of its node."""
    token_file: str | None = None
    """File with accepted bearer tokens, one a line (path or URI). The variable CAPTIONER_TOKENS may hold them instead.
    With tokens, only /healthz is open to clients without one."""

    @model_validator(mode="after")
    def _replicas_in_order(self) -> "ServeConfig":
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas: {self.min_replicas} must be at most max_replicas {self.max_replicas}"
            )
        return self
