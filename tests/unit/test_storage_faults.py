"""What errors of file systems mean: whether they pass, and what the user is told."""

import errno

import botocore.exceptions as boto
import pytest

from captioner.errors import OutOfReachError, StoreError
from captioner.storage.faults import Fault, fault_of, told


def arrow(error: str, key: str = "a.jpg") -> OSError:
    return OSError(
        f"When reading information for key '{key}' in bucket 'b': AWS Error {error} during HeadObject operation: "
        "No response body."
    )


def answered(code: str, status: int) -> boto.ClientError:
    return boto.ClientError(
        {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "PutObject"
    )


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (OSError(errno.EIO, "x"), Fault.PASSING),
        (OSError(errno.ESTALE, "x"), Fault.PASSING),
        *((OSError(number, "x"), Fault.PASSING) for number in (errno.EMFILE, errno.ENOMEM)),
        *((OSError(number, "x"), Fault.PASSING) for number in (errno.EBUSY, errno.ENODEV)),
        (OSError(errno.EACCES, "x"), Fault.DENIED),
        (FileNotFoundError(errno.ENOENT, "x"), Fault.ABSENT),
        (OSError(errno.ENOSPC, "x"), Fault.OTHER),
        (OSError("Corrupt page"), Fault.OTHER),
        (arrow("SLOW_DOWN"), Fault.PASSING),
        (arrow("NETWORK_CONNECTION"), Fault.PASSING),
        (arrow("UNKNOWN (HTTP status 503)"), Fault.PASSING),
        (arrow("UNKNOWN (HTTP status 429)"), Fault.PASSING),
        (arrow("UNKNOWN (HTTP status 501)"), Fault.OTHER),
        (arrow("ACCESS_DENIED"), Fault.DENIED),
        (arrow("UNKNOWN (HTTP status 400)"), Fault.DENIED),
        (arrow("REQUEST_EXPIRED"), Fault.DENIED),
        (arrow("NO_SUCH_BUCKET"), Fault.ABSENT),
        # What is in a key is nobody's error.
        (arrow("ACCESS_DENIED", key="SLOW_DOWN status 503.jpg"), Fault.DENIED),
        (answered("SlowDown", 503), Fault.PASSING),
        (answered("ExpiredToken", 400), Fault.DENIED),
        (answered("400", 400), Fault.DENIED),
        (answered("RequestTimeout", 400), Fault.PASSING),
        (answered("ThrottlingException", 400), Fault.PASSING),
        (answered("InvalidArgument", 400), Fault.OTHER),
        (answered("InvalidObjectState", 403), Fault.OTHER),
        (answered("AllAccessDisabled", 403), Fault.DENIED),
        (answered("NoSuchBucket", 404), Fault.ABSENT),
        (answered("NotImplemented", 501), Fault.OTHER),
        (boto.EndpointConnectionError(endpoint_url="http://Token"), Fault.PASSING),
        (boto.ReadTimeoutError(endpoint_url="http://b"), Fault.PASSING),
        (boto.NoCredentialsError(), Fault.DENIED),
        (boto.UnauthorizedSSOTokenError(), Fault.DENIED),
    ],
)
def test_faults_are_told_apart(error: Exception, fault: Fault) -> None:
    assert fault_of(error) == fault
    assert isinstance(
        told("read", "s3://b/a.jpg", error),
        OutOfReachError if fault == Fault.PASSING else StoreError,
    )


def test_whoever_is_denied_is_told_where_credentials_come_from() -> None:
    assert "AWS_PROFILE" in str(told("read", "s3://b/a", arrow("ACCESS_DENIED")))
    assert str(told("read", "/b/a", PermissionError(errno.EACCES, "x"))) == (
        "cannot read /b/a: Permission denied"
    )
