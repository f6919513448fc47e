"""Bearer tokens: where they come from, and whether a request carries one."""

import base64
import binascii
import hashlib
import hmac
import os
from collections.abc import Iterable

from captioner import storage
from captioner.errors import ConfigError

TOKENS = "CAPTIONER_TOKENS"


def read_tokens(token_file: str | None) -> list[str]:
    """Accepted tokens from ``CAPTIONER_TOKENS`` and from the file (path or URI); white space separates them.

    Raises:
        ConfigError: either holds no token, or the file is not text.
        StoreError: the file cannot be read.
    """
    texts = {TOKENS: os.environ[TOKENS]} if TOKENS in os.environ else {}
    if token_file is not None:
        try:
            texts["token_file"] = storage.read_bytes(token_file).decode()
        except UnicodeDecodeError:
            raise ConfigError(f"token_file: {token_file} is not text") from None
    for name, text in texts.items():
        if not text.split():
            # An empty variable is a mistake that would leave the service open.
            raise ConfigError(f"{name}: there is no token in it")
    return " ".join(texts.values()).split()


def digest_tokens(tokens: Iterable[str]) -> tuple[str, ...]:
    return tuple(hashlib.sha256(token.encode()).hexdigest() for token in tokens)


def authorized(header: str, digests: Iterable[str]) -> bool:
    """Whether an ``Authorization`` header carries a known token: as a bearer, or as the password browsers ask for."""
    scheme, _, value = header.partition(" ")
    value = value.strip()
    if scheme.lower() == "basic":
        try:
            value = base64.b64decode(value, validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return False
    elif scheme.lower() != "bearer":
        return False
    digest = hashlib.sha256(value.encode()).hexdigest()
    # A list: all of them are compared, so that the time says nothing about which.
    return any([hmac.compare_digest(digest, known) for known in digests])
