"""Distributed image captioning on Ray: extract features, train decoders, evaluate, caption, serve.

from captioner import Captioner

captioner = Captioner.load("runs/flickr8k/model")  # or hf:org/name
captioner.caption(["dog.jpg"])
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from captioner.artifacts.feature_store import FeatureStore
    from captioner.captioning.captioner import Candidate, Caption, Captioner
    from captioner.config import DecodeConfig
    from captioner.errors import CaptionerError

__version__ = "0.1.0"

# Loaded when they are first asked for: they take torch with them, and configurations need none.
_HOMES = {
    "Candidate": "captioner.captioning.captioner",
    "Caption": "captioner.captioning.captioner",
    "Captioner": "captioner.captioning.captioner",
    "CaptionerError": "captioner.errors",
    "DecodeConfig": "captioner.config",
    "FeatureStore": "captioner.artifacts.feature_store",
}

__all__ = [
    "Candidate",
    "Caption",
    "Captioner",
    "CaptionerError",
    "DecodeConfig",
    "FeatureStore",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
