"""The service for a person: starts Ray where there is none, and stays until it is stopped."""

import logging
import os
import signal
import socket
import threading

import ray
from ray import serve
from ray.serve.config import HTTPOptions
from ray.serve.schema import LoggingConfig

from captioner.config import ServeConfig
from captioner.errors import ConfigError, ModelError
from captioner.runtime.cluster import start_ray
from captioner.serving import proxy
from captioner.serving.build import build_app, describe_models
from captioner.serving.guard import GuardSettings

logger = logging.getLogger(__name__)

APP = "captioner"


def serve_models(config: ServeConfig) -> None:
    """Serve until SIGINT or SIGTERM; on a cluster that ``RAY_ADDRESS`` names, deploy and return.

    On such a cluster a second call replaces the models of the first one by one, without a failed request.

    Raises:
        ConfigError: the port is taken, or the token file cannot be used.
        ModelError: a model directory is unusable.
    """
    describe_models(config)
    guard = GuardSettings.of(config)
    joined = bool(os.environ.get("RAY_ADDRESS")) or ray.is_initialized()
    if not joined:
        _check_port(config.host, config.port)
        # Read by Ray Serve's proxies, which inherit the environment of the Ray started here.
        os.environ[proxy.CALLBACK] = proxy.CALLBACK_PATH
        os.environ[proxy.SETTINGS] = guard.model_dump_json()
    start_ray()
    if not joined and config.host not in ("127.0.0.1", "localhost", "::1"):
        tokens = "with" if guard.token_digests else "WITHOUT"
        logger.warning("listening on %s: open to the network, %s tokens", config.host, tokens)
    stop = threading.Event()
    if not joined:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
    try:
        deploy(config)
        logger.info("serving %s at %s", ", ".join(config.models), url(config))
        if not joined:
            stop.wait()
    finally:
        if not joined:
            serve.shutdown()
            ray.shutdown()


def deploy(config: ServeConfig) -> None:
    """Start the application on the connected Ray, or replace the one that runs there; returns when it is ready.

    Raises:
        ModelError: a replica does not start.
    """
    # It reports its own steps, and as news that options given a moment ago are not applied again.
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(
        http_options=HTTPOptions(
            host=config.host,
            port=config.port,
            # The Guard's limits come first; this one is for an API replica that hangs.
            request_timeout_s=config.upload_timeout_s + config.request_timeout_s + 10,
            keep_alive_timeout_s=30,
        ),
        logging_config=LoggingConfig(log_level="WARNING", enable_access_log=False),
    )
    try:
        serve.run(build_app(config), name=APP, route_prefix="/")
    except RuntimeError as error:
        raise ModelError(f"the service does not start: {error}") from error


def url(config: ServeConfig) -> str:
    host = f"[{config.host}]" if ":" in config.host else config.host
    return f"http://{host}:{config.port}"


def _check_port(host: str, port: int) -> None:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        raise ConfigError(f"--port: cannot listen on {host}:{port}: {reason}") from None
