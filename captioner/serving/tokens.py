"""Bearer tokens: where they come from, and whether a request carries one."""

import base64
import binascii
import contextlib
import hashlib
import hmac
import os
from collections.abc import Iterable, Iterator

from captioner import storage
from captioner.errors import ConfigError

TOKENS = "CAPTIONER_TOKENS"


def read_tokens(token_file: str | None) -> list[str]:
    """Accepted tokens from ``CAPTIONER_TOKENS`` and from the file (path or URI), one a line; ``#`` begins a comment.

    Raises:
        ConfigError: either holds no token, or a line that is none, or the file is not text.
        StoreError: the file cannot be read.
    """
    texts = {TOKENS: os.environ[TOKENS]} if TOKENS in os.environ else {}
    if token_file is not None:
        try:
            texts["token_file"] = storage.read_bytes(token_file).decode("utf-8")
        except UnicodeDecodeError:
            raise ConfigError(f"token_file: {token_file} is not text (UTF-8)") from None
    found = []
    for name, text in texts.items():
        tokens = list(_lines(name, text))
        if not tokens:
            # An empty variable is a mistake that would leave the service open.
            raise ConfigError(f"{name}: there is no token in it")
        found += tokens
    return found


def _lines(name: str, text: str) -> Iterator[str]:
    # A secret made of a file may have its byte-order mark, too.
    for number, line in enumerate(text.removeprefix("\ufeff").splitlines(), 1):
        token = line.strip()
        if not token or token.startswith("#"):
            continue
        # The line itself is a secret, which no message repeats.
        if len(token.split()) > 1:
            raise ConfigError(
                f"{name}: line {number} has several words; a token is one, a comment begins with #"
            )
        if not token.isprintable():
            raise ConfigError(f"{name}: line {number} has a character that nobody can send")
        yield token


def digest_tokens(tokens: Iterable[str]) -> tuple[str, ...]:
    """Digests of the bytes that clients send for them.

    Letters beyond ASCII come in UTF-8 from curl, and where they exist there in Latin-1 from browsers and from Python.
    """
    sent = []
    for token in tokens:
        sent.append(token.encode())
        with contextlib.suppress(UnicodeEncodeError):
            sent.append(token.encode("latin-1"))
    return tuple(hashlib.sha256(one).hexdigest() for one in dict.fromkeys(sent))


def authorized(header: bytes, digests: Iterable[str]) -> bool:
    """Whether an ``Authorization`` header carries a known token: as a bearer, or as the password browsers ask for."""
    scheme, _, value = header.partition(b" ")
    value = value.strip()
    if scheme.lower() == b"basic":
        try:
            value = base64.b64decode(value, validate=True).partition(b":")[2]
        except binascii.Error:
            return False
    elif scheme.lower() != b"bearer":
        return False
    digest = hashlib.sha256(value).hexdigest()
    # A list: all of them are compared, so that the time says nothing about which.
    return any([hmac.compare_digest(digest, known) for known in digests])
