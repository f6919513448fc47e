"""What Ray Serve's HTTP proxies get from us before they start their server."""

from typing import Any

import pytest
import uvicorn

from captioner.serving.guard import Guard, GuardSettings
from captioner.serving.proxy import SETTINGS, BoundedProtocol, middlewares
from captioner.serving.tokens import TOKENS


@pytest.fixture(autouse=True)
def untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uvicorn.config, "HTTP_PROTOCOLS", dict(uvicorn.config.HTTP_PROTOCOLS))
    monkeypatch.delenv(SETTINGS, raising=False)
    monkeypatch.delenv(TOKENS, raising=False)


def test_servers_made_afterwards_cut_off_slow_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SETTINGS, GuardSettings(upload_timeout_s=7).model_dump_json())
    middlewares()
    config = uvicorn.Config(lambda: None, factory=True, log_config=None)  # as Ray Serve makes it
    config.load()
    assert config.http_protocol_class is BoundedProtocol
    assert BoundedProtocol.seconds == 7


@pytest.mark.parametrize("variable", [SETTINGS, TOKENS])
def test_tokens_come_from_the_environment_of_the_node(
    monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    settings = GuardSettings(token_digests=("x",)).model_dump_json()
    monkeypatch.setenv(variable, settings if variable == SETTINGS else "secret")
    [one] = middlewares()
    assert one.cls is Guard
    kept: Any = one.kwargs["settings"]
    assert len(kept.token_digests) == 1
    assert "secret" not in kept.token_digests
