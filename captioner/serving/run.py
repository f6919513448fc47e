"""The service for a person: starts Ray where there is none, and stays until it is stopped."""

import logging
import os
import signal
import socket
import ssl
import tempfile
import threading
from pathlib import Path

import ray
from ray import serve
from ray.serve.config import HTTPOptions
from ray.serve.schema import LoggingConfig

from captioner.config import ServeConfig
from captioner.errors import ConfigError, ModelError, one_line
from captioner.images.load import HEIF_EXTRA, has_loader
from captioner.runtime.cluster import start_ray
from captioner.runtime.screen import SCREEN
from captioner.serving import proxy
from captioner.serving.build import application, describe_models
from captioner.serving.guard import GuardSettings, drain
from captioner.serving.replica import CaptionModel

logger = logging.getLogger(__name__)

APP = "captioner"


def serve_models(config: ServeConfig, kind: type[CaptionModel] = CaptionModel) -> None:
    """Serve until SIGINT or SIGTERM, and then until what is under way is answered; a second one ends it at once. On a
    cluster that ``RAY_ADDRESS`` names, deploy and return.

    On such a cluster a second call replaces the models of the first one by one, without a failed request.

    Raises:
        ConfigError: the port is taken, the token file cannot be used, or a type of images cannot be loaded.
        ModelError: a model directory is unusable.
    """
    describe_models(config)
    guard = GuardSettings.of(config)
    if os.environ.get("RAY_ADDRESS") or ray.is_initialized():
        start_ray()
        deploy(config, kind)
        logger.info("serving %s at %s", ", ".join(config.models), url(config))
        logger.info("next: open %s/ in a browser", url(config))
        return
    _check_types(config)
    _check_certificate(config)
    _check_port(config.host, config.port)
    with tempfile.TemporaryDirectory(prefix="captioner-") as folder:
        # Read by Ray Serve's proxies, which inherit the environment of the Ray started here.
        os.environ[proxy.CALLBACK] = proxy.CALLBACK_PATH
        watched = guard.model_copy(update={"drain_folder": folder})
        os.environ[proxy.SETTINGS] = watched.model_dump_json()
        start_ray()
        if config.host not in ("127.0.0.1", "localhost", "::1"):
            tokens = "with" if guard.token_digests else "WITHOUT"
            logger.warning("listening on %s: open to the network, %s tokens", config.host, tokens)
        try:
            SCREEN.wait_for("starting the service")
            deploy(config, kind)
            SCREEN.pass_by("", last=True)
            signals = [threading.Event(), threading.Event()]

            def stop(*_: object) -> None:
                signals[signals[0].is_set()].set()

            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, stop)
            logger.info("serving %s at %s", ", ".join(config.models), url(config))
            logger.info("next: open %s/ in a browser; Ctrl-C ends the service", url(config))
            signals[0].wait()
            logger.info("answering what is under way")
            drain(Path(folder), signals[1].wait, config.request_timeout_s + 5)
        finally:
            serve.shutdown()
            ray.shutdown()


def deploy(config: ServeConfig, kind: type[CaptionModel] = CaptionModel) -> None:
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
            ssl_keyfile=config.key,
            ssl_certfile=config.certificate,
        ),
        logging_config=LoggingConfig(log_level="WARNING", enable_access_log=False),
    )
    try:
        serve.run(application(config, kind), name=APP, route_prefix="/")
    except RuntimeError as error:
        raise ModelError(f"the service does not start: {one_line(error)}") from error


def url(config: ServeConfig) -> str:
    host = f"[{config.host}]" if ":" in config.host else config.host
    return f"{'https' if config.certificate else 'http'}://{host}:{config.port}"


def _check_types(config: ServeConfig) -> None:
    if "heic" in config.types and not has_loader("HEIF"):
        raise ConfigError(f"--types: heic takes the extra: pip install 'captioner[{HEIF_EXTRA}]'")


def _check_certificate(config: ServeConfig) -> None:
    if config.certificate is None:
        return
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(config.certificate, config.key, password=lambda: "")
    except OSError as error:  # ssl's own errors are such
        reason = error.reason if isinstance(error, ssl.SSLError) else error.strerror
        raise ConfigError(f"--certificate, --key: they cannot be used: {reason}") from None


def _check_port(host: str, port: int) -> None:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        raise ConfigError(f"--port: cannot listen on {host}:{port}: {reason}") from None
