"""Files that one of several writers creates or replaces, as far as a store can tell writers apart."""

import contextlib
import errno
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from captioner.errors import StoreError
from captioner.storage.faults import Fault, fault_of, told
from captioner.storage.files import (
    exists,
    is_local,
    new_partial,
    read_bytes,
    resolve,
    write_bytes,
)

# What file systems without hard links answer to a request for one.
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EINVAL)
_CONFLICTS = ("PreconditionFailed", "ConditionalRequestConflict", "NoSuchKey")
_NOT_THERE = ("NotImplemented", "MethodNotAllowed")


class TakenError(StoreError):
    """Another writer was first."""


class UnconditionalError(StoreError):
    """The store has no conditional writes."""


def is_s3(uri: str) -> bool:
    return uri.startswith("s3://")


def create_exclusively(uri: str, data: bytes) -> bool:
    """Create a file whole that must not exist: of several writers exactly one succeeds, and each that wrote the same.

    Locally by ``link(2)``, on S3 by a conditional PUT.

    Returns:
        whether the store really keeps others out. Where it has neither links nor conditions, and on object stores other
        than S3, a look comes first and the writing second, which leaves a gap for another to do the same.

    Raises:
        TakenError: it exists already, with other data.
        StoreError: it cannot be written.
        OutOfReachError: the store cannot be reached.
    """
    try:
        if is_local(uri):
            return _link(uri, Path(resolve(uri)[1]), data)
        if is_s3(uri):
            with contextlib.suppress(UnconditionalError):
                put(uri, data, None)
                return True
        if exists(uri):
            raise TakenError(f"{uri} exists already")
        write_bytes(uri, data)
        return False
    except TakenError:
        # Perhaps by this very call: a client that has lost an answer asks again.
        if read_bytes(uri) != data:
            raise
        return True


def _link(uri: str, path: Path, data: bytes) -> bool:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_partial(path) as partial:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(partial, path)
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                if path.exists():
                    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from None
                partial.rename(path)
                return False
    except FileExistsError as error:
        raise TakenError(f"{uri} exists already") from error
    except OSError as error:
        raise told("write", uri, error) from error
    return True


def put(uri: str, data: bytes, tag: str | None) -> str:
    """Write an object of S3 where it is still the one with this ETag, or, for None, where there is none.

    Returns:
        its new ETag.

    Raises:
        TakenError: it is another.
        UnconditionalError: the store has no conditional writes.
        StoreError: it cannot be written.
        OutOfReachError: the store cannot be reached.
    """
    condition = {"IfNoneMatch": "*"} if tag is None else {"IfMatch": tag}
    with _s3("write", uri) as (client, place):
        answer = client.put_object(**place, Body=data, **condition)
    return _tag("write", uri, answer)


def get(uri: str) -> tuple[bytes, str] | None:
    """An object of S3 and its ETag; None where there is none.

    Raises:
        StoreError: it cannot be read.
        OutOfReachError: the store cannot be reached.
    """
    try:
        with _s3("read", uri) as (client, place):
            answer = client.get_object(**place)
            return answer["Body"].read(), _tag("read", uri, answer)
    except TakenError:
        return None


def _tag(what: str, uri: str, answer: dict[str, Any]) -> str:
    """
    Raises:
        StoreError: there is none: it was no S3 that answered, but a proxy with a page of its own, say.
    """
    if "ETag" not in answer:
        raise StoreError(f"cannot {what} {uri}: what answers is no S3, for it gives no ETag")
    return str(answer["ETag"])


@contextlib.contextmanager
def _s3(what: str, uri: str) -> Iterator[tuple[Any, dict[str, str]]]:
    from botocore.exceptions import BotoCoreError, ClientError

    _, path = resolve(uri)
    bucket, _, key = path.partition("/")
    names = ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
    try:
        yield _client(*map(os.environ.get, names)), {"Bucket": bucket, "Key": key}
    except (BotoCoreError, ClientError) as error:
        code = getattr(error, "response", {}).get("Error", {}).get("Code")
        if code in _CONFLICTS:
            raise TakenError(f"{uri} exists already") from error
        if code in _NOT_THERE and fault_of(error) == Fault.OTHER:
            raise UnconditionalError(f"cannot {what} {uri}: no conditional writes") from error
        raise told(what, uri, error) from error


@cache
def _client(region: str | None, default_region: str | None, *endpoint: str | None) -> Any:
    # boto3 reads the endpoint itself, and one name of the region.
    import boto3
    from botocore.config import Config

    patience = Config(
        connect_timeout=10, read_timeout=30, retries={"mode": "standard", "max_attempts": 4}
    )
    return boto3.client("s3", region_name=region or default_region, config=patience)
