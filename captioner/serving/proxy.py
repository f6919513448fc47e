"""What Ray Serve's HTTP proxies run before their own code: ``RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH`` names it.

The proxies answer some paths themselves (``/-/routes``), and bound neither connections nor what comes over them. All of
that is bounded here, before a token is seen.
"""

import os

import uvicorn.config
from starlette.middleware import Middleware

from captioner.serving import connection
from captioner.serving.connection import BoundedProtocol
from captioner.serving.guard import Guard, GuardSettings
from captioner.serving.metrics import count_rejected, count_request
from captioner.serving.tokens import digest_tokens, read_tokens

CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
CALLBACK_PATH = "captioner.serving.proxy.middlewares"
SETTINGS = "CAPTIONER_GUARD"


def middlewares() -> list[Middleware]:
    """Called once in every proxy, before its server starts."""
    settings = proxy_settings()
    BoundedProtocol.settings = settings
    bound_connections()
    return [Middleware(Guard, settings=settings, reject=count_rejected, observe=count_request)]


def bound_connections() -> None:
    """Have the servers made from now on in this process make connections of ours.

    Ray Serve hands uvicorn no protocol, and uvicorn has no options for most of what ours bounds. Of protocols that are
    asked for by name this table decides.
    """
    uvicorn.config.HTTP_PROTOCOLS["auto"] = f"{connection.__name__}:make_connection"
    uvicorn.config.create_ssl_context = connection.keep_context  # type: ignore[assignment]


def proxy_settings() -> GuardSettings:
    """From the environment of the proxy's node: ``CAPTIONER_GUARD`` (JSON), and the tokens of ``CAPTIONER_TOKENS``.

    Raises:
        ConfigError: the tokens cannot be used.
    """
    settings = GuardSettings.model_validate_json(os.environ.get(SETTINGS) or "{}")
    digests = dict.fromkeys((*settings.token_digests, *digest_tokens(read_tokens(None))))
    return settings.model_copy(update={"token_digests": tuple(digests)})
