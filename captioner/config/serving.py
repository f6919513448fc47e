"""Settings of the caption service."""

import re
from typing import Annotated, Literal
from urllib.parse import unquote

import tyro
from pydantic import Field, ValidationError, model_validator

from captioner.config.decoding import DecodeOverrides
from captioner.config.parts import Config, ImageLimits, JobConfig, Positive

Seconds = Annotated[float, Field(gt=0.0)]
ImageType = Literal["jpeg", "png", "webp", "gif", "bmp", "tiff", "avif", "heic"]

# NAME=URI. A path may have an = of its own: what has a slash before it is a name where a whole URI follows.
_NAMED = re.compile(
    r"(?P<name>[^=/]+|(?![/.~]|\w+:/)[^=]+(?==(?:[/.~]|\w+:)))=(?P<uri>.+)", re.DOTALL
)


class Served(Config):
    """What is served, and where."""

    model: Annotated[tuple[str, ...], Field(min_length=1), tyro.conf.UseAppendAction]
    """Model directory (path or URI), or NAME=URI; repeat the flag to serve several. The first is the default."""
    host: str = "127.0.0.1"
    """Address to listen on. The default is this machine alone; 0.0.0.0 opens the service to the network."""
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    """Port to listen on."""
    certificate: str | None = None
    """Certificate chain for HTTPS, a PEM file on the machine that listens; with key."""
    key: str | None = None
    """Private key of the certificate, a PEM file without a pass phrase."""

    @model_validator(mode="after")
    def _certificate_has_a_key(self) -> "Served":
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate: HTTPS takes certificate and key")
        return self

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
            last = unquote(last) if uri.startswith("file:") else last
            found.append((match["name"] if match else last or "model", uri))
        return found


class UploadBounds(Config):
    """What clients may send and hold."""

    max_request_bytes: Positive = 64 * 2**20
    """Largest request body, in bytes."""
    max_uploads: Positive = 256
    """Requests that one HTTP replica works on at once; beyond it clients get 503."""
    max_upload_bytes: Positive = 512 * 2**20
    """Bytes of request bodies that a process of the service holds at once, whose memory they may take twice; beyond it
    clients get 503."""
    max_header_bytes: Annotated[int, Field(ge=1024)] = 32 * 2**10
    """Largest request line and headers, in bytes; beyond it clients get 431."""
    max_connections: Positive = 2048
    """Connections to one HTTP proxy at once; beyond it clients get 503, but for those that ask for health."""
    max_connections_per_address: Positive = 512
    """The same from one address. Behind a load balancer, which has one address, as many as max_connections."""
    upload_timeout_s: Seconds = 20.0
    """Longest time a client may take to send its request, in seconds."""
    retry_after_s: Positive = 1
    """What clients that get 503 are told to wait at least, in seconds."""
    access_log: bool = False
    """Also log a line for every request: its id, method, path, status and time; no token, no file name. It is in the
    logs of Ray's session and, with verbose, on the screen."""


class ReplicaSettings(Config):
    """What a replica of a model goes by. A change of other settings starts none again."""

    limits: ImageLimits = ImageLimits(max_bytes=16 * 2**20)
    max_loading_bytes: Positive = 2**30
    """Memory that a model replica takes for loading images at once, in bytes; others wait, or get 503."""
    request_timeout_s: Seconds = 30.0
    """Longest time to the answer once a request is complete, in seconds. Who could not be answered in it gets 503 at
    once, and when to come back."""
    max_queued: Positive = 128
    """Requests that a model replica holds, waiting or under way; beyond it clients get 503."""
    max_batch_size: Positive = 32
    """Most images in one forward pass."""
    threads: Positive | None = None
    """Threads of one model replica on CPU; default: the cores of its node."""


class ServeConfig(ReplicaSettings, UploadBounds, Served, JobConfig):
    """Serve models over HTTP: an API and a web page."""

    decode: DecodeOverrides = DecodeOverrides()
    """What a request that says nothing else gets, over each model's own search."""
    decode_of: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """The same for one of several models: MODEL.SETTING=VALUE, such as small.beam-size=1; repeat the flag for more."""
    types: Annotated[tuple[ImageType, ...], Field(min_length=1)] = (
        "jpeg",
        "png",
        "webp",
        "gif",
        "avif",
    )
    """Accepted image types, recognised by content; heic takes the extra heif."""
    max_images: Positive = 16
    """Most images in one request; beyond it clients get 422."""
    max_cost: Positive = 200_000
    """Most that the search of one request may take: images x longest caption in words x (beams x captions + samples);
    beyond it clients get 422."""
    min_replicas: Positive = 1
    """Fewest replicas of each model."""
    max_replicas: Positive = 1
    """Most replicas of each model; between the two Ray Serve follows the load."""
    target_ongoing_requests: Annotated[float, Field(gt=0.0)] | None = None
    """Requests per model replica that autoscaling aims at; default: max_batch_size."""
    http_replicas: Positive = 1
    """Replicas of the HTTP API."""
    gpus_per_replica: Annotated[float, Field(ge=0.0)] | None = None
    """GPUs of one model replica; default: where the cluster has any now, half of one, or less where two versions of
    all models would not fit. Name it where GPUs join the cluster later."""
    cpus_per_replica: Annotated[float, Field(gt=0.0)] | None = None
    """CPUs one model replica reserves; default: at most 1, less where the cluster could not hold a second version."""
    token_file: str | None = None
    """File with accepted bearer tokens, one a line (path or URI). The variable CAPTIONER_TOKENS may hold them instead.
    With tokens, only /healthz is open to clients without one."""

    @model_validator(mode="after")
    def _decodes_are_of_models(self) -> "ServeConfig":
        for name in self.models:
            self.search_of(name)
        for text in self.decode_of:
            if not any(text.startswith(f"{name}.") for name in self.models):
                known = ", ".join(self.models)
                raise ValueError(
                    f"decode_of: {text!r} is not MODEL.SETTING=VALUE of one of {known}"
                )
        return self

    def search_of(self, model: str) -> DecodeOverrides:
        """What requests to a model get that say nothing else, over its own search.

        Raises:
            ValueError: a setting does not exist, or its value is not allowed.
        """
        own = {}
        for text in self.decode_of:
            # Of two models, one called as the other's beginning, the longer one is meant.
            name = max(
                (one for one in self.models if text.startswith(f"{one}.")), key=len, default=""
            )
            if name == model:
                setting, equals, value = text[len(name) + 1 :].partition("=")
                if not equals:
                    raise ValueError(f"decode_of: {text!r} is not MODEL.SETTING=VALUE")
                own[setting.replace("-", "_")] = value
        try:
            return DecodeOverrides.model_validate(self.decode.model_dump(exclude_none=True) | own)
        except ValidationError as error:
            [first, *_] = error.errors()
            place = ".".join(map(str, first["loc"]))
            raise ValueError(
                f"decode_of: {model}.{place}: {first['msg']} (got {first['input']!r})"
            ) from None

    @model_validator(mode="after")
    def _replicas_in_order(self) -> "ServeConfig":
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas: {self.min_replicas} must be at most max_replicas {self.max_replicas}"
            )
        return self
