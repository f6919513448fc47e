"""Every error the package raises on purpose.

::

    CaptionerError
    +-- OutOfReachError  a store, a cluster or a directory cannot be had now; the same command goes on later
    +-- ConfigError   a setting is wrong, or two settings do not go together
    +-- SourceError   images or captions cannot be read, or contradict each other
    +-- StoreError    a published directory is absent, incomplete, or belongs to another run
    +-- ModelError    weights, vocabulary, encoder and features do not fit
    +-- TrainingError training cannot go on (a loss that is not finite)
    +-- ImageError    bytes that are not a picture we accept
        +-- ImageTypeError      of a type that is not on the list
        +-- ImageTooLargeError  over the byte or the pixel limit

A message is one line: what is wrong, with which value, and what would be right. Jobs print it and exit with its status.
"""

from typing import ClassVar


class CaptionerError(Exception):
    """Base of all errors that the user, not the programmer, can mend."""

    status: ClassVar[int] = 2
    """Exit status of a job that ends with it."""


class OutOfReachError(CaptionerError):
    """Something cannot be had now, through no fault of the command: the same one goes on later."""

    status = 75  # EX_TEMPFAIL of sysexits.h


class ConfigError(CaptionerError, ValueError):
    """A setting is out of range or contradicts another."""


class SourceError(CaptionerError):
    """A source of images or captions cannot be read or contradicts itself."""


class StoreError(CaptionerError):
    """A published directory is absent, incomplete, or was made by another run."""


class ModelError(CaptionerError):
    """A model directory is unusable, or does not fit the features or encoder it is used with."""


class TrainingError(CaptionerError):
    """Training stopped because going on would spoil the model."""


class ImageError(CaptionerError):
    """The bytes are not an image this project accepts; the message is the reason, without the image's name."""


class ImageTypeError(ImageError):
    """Not an image of an accepted type."""


class ImageTooLargeError(ImageError):
    """More bytes or pixels than the limits allow."""


def one_line(error: BaseException) -> str:
    """What an error says, or its kind where it says nothing, in one line of at most 300 characters, the end of it."""
    return (" ".join(str(error).split()) or type(error).__name__)[-300:]
