"""From a ``ServeConfig`` to a Ray Serve application."""

import hashlib
import math
import os
import re

from ray import serve
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import LoggingConfig

from captioner.artifacts.model_directory import ModelDirectory
from captioner.artifacts.models import Model, open_any
from captioner.config import DecodeConfig, ReplicaSettings, ServeConfig
from captioner.decoders import decoder_class
from captioner.errors import ConfigError
from captioner.runtime.cluster import num_cpus, num_gpus
from captioner.serving.guard import GuardSettings
from captioner.serving.ingress import CaptionApi
from captioner.serving.messages import EncoderCard, ModelCard
from captioner.serving.replica import CaptionModel

# A line per request costs more than it tells: the metrics count them.
_QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)
_UNBOUNDED = 100_000
_LEAST = 0.001


def build_app(args: ServeConfig) -> serve.Application:
    """The application: one deployment per model, and the API in front of them.

    Needs a running Ray. ``serve deploy`` calls it with the ``args`` of its file.

    Raises:
        ConfigError, ModelError: as ``application``.
    """
    return application(args, CaptionModel)


def application(args: ServeConfig, kind: type[CaptionModel]) -> serve.Application:
    """``build_app`` with replicas of another class.

    Raises:
        ModelError: a model directory is unusable.
        ConfigError: the token file cannot be used.
    """
    cards = describe_models(args)
    model = model_deployment(args, kind)
    settings = ReplicaSettings(**args.model_dump(include=set(ReplicaSettings.model_fields)))
    handles = {
        name: model.options(name=deployment_name(name)).bind(
            name, open_any(uri).uri, settings, args.max_upload_bytes
        )
        for name, uri in args.models.items()
    }
    return api_deployment(args).bind(args, GuardSettings.of(args), cards, handles)


def _refuse_ha_proxy() -> None:
    """Ray Serve's other proxy would listen on all interfaces whatever the host, and answer some paths before our Guard.

    Raises:
        ConfigError: it is asked for.
    """
    for name in (
        "RAY_SERVE_ENABLE_HA_PROXY",
        "RAY_SERVE_ENABLE_DIRECT_INGRESS",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED",
    ):
        if os.environ.get(name, "0") not in ("", "0"):
            raise ConfigError(f"{name}: the service cannot be guarded behind that proxy; unset it")


def deployment_name(model: str) -> str:
    """What Ray Serve knows a model by, whatever it is called: Ray wants ASCII in the tags of its metrics, and makes
    names of log files and actors of it. A plain name stays readable."""
    plain = re.sub(r"[^A-Za-z0-9_.-]", "_", model)[:40]
    if plain == model:
        return f"model-{model}"
    return f"model-{plain}-{hashlib.sha256(model.encode()).hexdigest()[:8]}"


def model_deployment(
    config: ServeConfig, kind: type[CaptionModel] = CaptionModel
) -> serve.Deployment:
    """Scaling and bounds of the replicas of a model, each model's alike.

    By default a replica reserves so little that each can stand beside its successor while a new version starts.
    """
    gpus, cpus = config.gpus_per_replica, config.cpus_per_replica
    most = 2 * len(config.models) * config.max_replicas
    if gpus is None:
        gpus = _share(num_gpus(), most, 0.5)
    if cpus is None:
        # A little, where that is all: no replica should come to lie on a head without CPUs.
        cpus = max(_LEAST, _share(num_cpus(), most, 1.0))
    return serve.deployment(kind).options(
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        autoscaling_config=AutoscalingConfig(
            min_replicas=config.min_replicas,
            max_replicas=config.max_replicas,
            target_ongoing_requests=config.target_ongoing_requests or config.max_batch_size,
            upscale_delay_s=5,
            downscale_delay_s=120,
            look_back_period_s=15,
        ),
        # Its own queue refuses what is too much, and knows better what that is; health is asked for through here, too.
        max_ongoing_requests=_UNBOUNDED,
        graceful_shutdown_timeout_s=config.request_timeout_s + 5,
        max_surge_percent=100,
        max_constructor_retry_count=3,
        logging_config=_QUIET,
    )


def _share(units: int, replicas: int, most: float) -> float:
    """What one of so many replicas takes that none of them lies across two units, in Ray's ten-thousandths."""
    if replicas <= units:
        return most
    return min(most, math.floor(1e4 / math.ceil(replicas / units)) / 1e4) if units else 0.0


def api_deployment(config: ServeConfig) -> serve.Deployment:
    """Replicas and bounds of the API."""
    return serve.deployment(serve.ingress()(CaptionApi)).options(
        name="api",
        num_replicas=config.http_replicas,
        ray_actor_options={"num_cpus": 0},
        # Its Guard answers what is too much with 503, and lets health through.
        max_ongoing_requests=_UNBOUNDED,
        graceful_shutdown_timeout_s=config.upload_timeout_s + config.request_timeout_s + 5,
        max_surge_percent=100,
        logging_config=_QUIET,
    )


def describe_models(config: ServeConfig) -> dict[str, ModelCard]:
    """What /v1/models says, the default model first; also the check that they can be loaded at all.

    Raises:
        ModelError: a model directory is unusable.
        ConfigError: a model cannot be searched as asked, or Ray Serve is set to a proxy that cannot be guarded.
    """
    _refuse_ha_proxy()
    models = {name: open_any(uri) for name, uri in config.models.items()}
    default = next(iter(models))
    return {
        name: _card(name, model, model.search(config.search_of(name)), name == default)
        for name, model in models.items()
    }


def _card(name: str, model: Model, decode: DecodeConfig, default: bool) -> ModelCard:
    version = model.version[:12]
    if not isinstance(model, ModelDirectory):
        return ModelCard(
            name=name, version=version, decoder=model.kind, decode=decode, default=default
        )
    record, spec = model.record, model.record.encoder.spec
    return ModelCard(
        name=name,
        version=version,
        decoder=record.decoder.kind,
        encoder=EncoderCard(family=spec.family, name=spec.name, layer=spec.layer),
        vocabulary_size=record.vocabulary_size,
        attention=decoder_class(record.decoder.kind).attends,
        decode=decode,
        default=default,
    )
