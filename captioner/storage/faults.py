"""What an error of a file system means: whether it passes, whether it is a matter of permission."""

import errno
import os
import re
from enum import Enum, auto

from captioner.errors import CaptionerError, OutOfReachError, StoreError


class Fault(Enum):
    """Kinds of errors."""

    PASSING = auto()
    """The store is overloaded, away or slow: worth another try."""
    DENIED = auto()
    """Who asks may not, or credentials are wrong or expired."""
    ABSENT = auto()
    """There is no such file, directory or bucket."""
    OTHER = auto()


_ERRNO = {
    **dict.fromkeys(
        (
            # The store, or the network or device in between.
            *(errno.EIO, errno.EREMOTEIO, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.ENOMEDIUM),
            *(errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.ETIME, errno.ETIMEDOUT),
            *(errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.ESHUTDOWN),
            *(errno.EHOSTUNREACH, errno.EHOSTDOWN, errno.ENETUNREACH, errno.ENETDOWN),
            *(errno.ENETRESET, errno.ENOTCONN, errno.EKEYEXPIRED),
            # This machine: what it has too few of.
            *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS),
        ),
        Fault.PASSING,
    ),
    errno.EACCES: Fault.DENIED,
    errno.EPERM: Fault.DENIED,
    errno.ENOENT: Fault.ABSENT,
}
# By the name of the error in AWS's library or protocol, or by the status of HTTP where there is no name for it.
_NAMES = (
    (Fault.OTHER, "InvalidObjectState"),  # in an archive: nobody reads it before it is restored
    (Fault.ABSENT, r"NO_SUCH_|RESOURCE_NOT_FOUND|NoSuch|status 404"),
    (
        Fault.PASSING,
        r"SLOW_DOWN|THROTTLING|INTERNAL_FAILURE|SERVICE_UNAVAILABLE|REQUEST_TIMEOUT|NETWORK_CONNECTION"
        r"|SlowDown|Throttl|RequestTimeout |IncompleteBody|OperationAborted|status (408|429|5(?!01)\d\d)",
    ),
    (
        Fault.DENIED,
        r"ACCESS_DENIED|ACCESS_KEY|SIGNATURE|SIGNING|_TOKEN|CREDENTIALS|REQUEST_EXPIRED|TOO_SKEWED|UNRECOGNIZED_CLIENT"
        r"|AccessDenied|AccessKey|SignatureDoesNotMatch|Token|RequestExpired|status 40[13]"
        # Whoever asks for no more than a header is told no name, of what has expired neither.
        r"|^400 status 400|UNKNOWN .*status 400",
    ),
)
_OF_ARROW = re.compile(r"AWS Error (.*?) during \w+ operation(: Unable to parse \w+: \w+)?")
# boto3's, of which it has no answer of the server.
_OF_BOTO = {
    **dict.fromkeys(
        (
            *("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError"),
            *("TokenRetrievalError", "SSOError"),
        ),
        Fault.DENIED,
    ),
    **dict.fromkeys(("ConnectionError", "HTTPClientError", "IncompleteReadError"), Fault.PASSING),
}


def fault_of(error: BaseException) -> Fault:
    """What an ``OSError`` of a file system or an error of boto3 means."""
    if isinstance(error, OSError) and error.errno:
        return _ERRNO.get(error.errno, Fault.OTHER)
    if found := _OF_ARROW.search(str(error)):
        said = found[0]
    elif response := getattr(error, "response", None):
        said = (
            f"{response['Error']['Code']} status {response['ResponseMetadata']['HTTPStatusCode']}"
        )
    else:
        kinds = (_OF_BOTO.get(kind.__name__) for kind in type(error).__mro__)
        return next((kind for kind in kinds if kind), Fault.OTHER)
    return next((fault for fault, names in _NAMES if re.search(names, said)), Fault.OTHER)


def told(what: str, uri: str, error: BaseException) -> CaptionerError:
    """An error of a file system or of boto3 as ours: ``cannot read s3://...: why``, in one line."""
    text = f"cannot {what} {uri}: {one_line(error)}"
    fault = fault_of(error)
    if fault == Fault.PASSING:
        return OutOfReachError(text)
    if fault == Fault.DENIED and uri.startswith("s3:"):
        text += " (are the credentials right, and not expired? AWS_ACCESS_KEY_ID, AWS_PROFILE or the node's role)"
    return StoreError(text)


def one_line(error: BaseException) -> str:
    """What an error says, in the system's words where it has any."""
    text = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
    if (
        isinstance(error, FileNotFoundError) and not error.errno
    ):  # Arrow's says which, and nothing else
        text += " is missing"
    return " ".join(text.split())
