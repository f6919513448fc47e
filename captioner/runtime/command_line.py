"""Command lines: a configuration from the arguments, one library call, and exit statuses people can script with.

Status 0: published. 2: the input was wrong, and one line on stderr says which field, which value, what is allowed.
75: something was out of reach, and the same command goes on later. 130 and 143: interrupted by Ctrl-C or SIGTERM;
nothing is published, and the same command goes on.
"""

import errno
import functools
import os
import shlex
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

import tyro
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from captioner.config import Config, JobConfig
from captioner.errors import CaptionerError, ConfigError, OutOfReachError
from captioner.runtime import tyro_errors
from captioner.runtime.flags import Place, registry, spell, spellings, stand_in
from captioner.runtime.screen import SCREEN

SHELLS = ("bash", "zsh", "fish")
_USERS_TO_MEND = (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT)

AnyConfig = TypeVar("AnyConfig", bound=Config)
AnyJob = TypeVar("AnyJob", bound=JobConfig)


def run(
    job: Callable[[AnyJob], str | None], config_type: type[AnyJob], **parse_options: Any
) -> None:
    """Parse ``sys.argv`` into ``config_type``, call ``job`` with it, and turn errors into one line.

    Args:
        job: gives what its user may want to do next, shown as the last line, or None.
        parse_options: go to ``parse``.
    """
    again = "the same command"
    try:
        take_signals()
        with _reader_may_leave():
            config = parse(config_type, sys.argv[1:], **parse_options)
        if getattr(config, "restart", False):
            again += " without --restart"
        with SCREEN.job(verbose=config.verbose):
            if following := job(config):
                SCREEN.say(f"next: {following}")
    except CaptionerError as error:
        fail(str(error), error.status)
    except KeyboardInterrupt as stop:
        SCREEN.say(f"interrupted; {again} goes on from here")
        raise SystemExit(143 if isinstance(stop, _Terminated) else 130) from None
    except Exception as error:
        # A full disk or a missing permission is the user's to mend.
        if isinstance(error, OSError) and error.errno in _USERS_TO_MEND:
            fail(f"{os.strerror(error.errno)}: {error.filename or 'output'}")
        from captioner.storage.faults import Fault, fault_of, one_line

        if isinstance(error, OSError) and fault_of(error) == Fault.PASSING:
            fail(one_line(error), OutOfReachError.status)
        if not SCREEN.hides:
            raise
        from captioner.runtime.failures import cause  # takes Ray, which is there now

        traceback.print_exc()
        SCREEN.keep_log(tempfile.gettempdir())
        fail(f"{cause(error)} (more is in {SCREEN.log})", status=1)


class _Terminated(KeyboardInterrupt):
    """SIGTERM ends a job as Ctrl-C does."""


def take_signals() -> None:
    """Have Ctrl-C and SIGTERM raise ``KeyboardInterrupt`` in the main thread, but for what a shell has ignored."""

    def terminate(*_: object) -> NoReturn:
        raise _Terminated

    for number, handler in (
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGTERM, terminate),
    ):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


@contextmanager
def _reader_may_leave() -> Iterator[None]:
    """Help whose reader has seen enough (``--help | head``) ends as other programs do: without a word."""
    before = signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        yield
    finally:
        sys.stdout.flush()
        signal.signal(signal.SIGPIPE, before)


def fail(message: str, status: int = 2) -> NoReturn:
    """One line on stderr, and the end."""
    SCREEN.say(f"error: {' '.join(message.split())}")
    raise SystemExit(status)


def take_name(program: str, names: Mapping[str, str]) -> str:
    """Take the first argument, one of ``names`` (with a line of help each), from ``sys.argv``; the rest is for ``run``.

    Ends with status 0 after ``--help``, with status 2 where the name is missing or another.
    """
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in ("-h", "--help"):
        width = max(map(len, names))
        lines = [f"  {name:{width}}  {text}" for name, text in names.items()]
        with _reader_may_leave():
            print("\n".join([f"usage: {program} NAME ..., NAME --help for more", "", *lines]))
        raise SystemExit(0)
    if name not in names:
        fail(f"{program}: {shlex.quote(name)} is not one of {', '.join(names)}")
    sys.argv[:2] = [f"{program} {name}"]
    return name


def print_completion(program: str, commands: Mapping[str, type[Config]]) -> None:
    """Print the script that makes a shell complete the names and flags of ``commands``; the shell is in ``sys.argv``.

    Ends with status 2 where it is none of those that tyro knows.
    """
    shell = sys.argv[1] if len(sys.argv) > 1 else ""
    if shell not in SHELLS:
        fail(f"{program} completion: {shlex.quote(shell)} is not one of {', '.join(SHELLS)}")
    tyro.extras.subcommand_cli_from_dict(
        dict(commands),
        prog=program,
        args=["--tyro-print-completion", shell],
        registry=registry(),
    )


def parse(
    config_type: type[AnyConfig],
    arguments: Sequence[str],
    *,
    presets: Mapping[str, Callable[[], AnyConfig]] | None = None,
) -> AnyConfig:
    """Configuration from command-line arguments.

    With ``presets``, ``--preset NAME`` gives the defaults that the other flags override.

    Raises:
        ConfigError: a value is wrong; the message names the field, the value and what is allowed.
        SystemExit: ``--help`` was asked for.
    """
    flags = spellings(config_type)
    read = functools.partial(
        tyro.cli,
        config_type,
        prog=os.path.basename(sys.argv[0]),
        config=[tyro.conf.PositionalMetavarFromFieldName],
        registry=registry(),
    )
    with tyro_errors.raised(arguments, [*flags.values(), *(["--preset"] if presets else [])]):
        if presets:
            preset, arguments = tyro.cli(
                _preset, args=arguments, return_unknown_args=True, add_help=False
            )
            if preset not in (None, *presets):
                raise ConfigError(f"--preset: {preset!r} is not one of {', '.join(presets)}")
            listed = "\n  ".join(
                [f"{config_type.__doc__}\n--preset NAME: other defaults", *presets]
            )
            default = {} if preset is None else {"default": presets[preset]()}
            read = functools.partial(read, description=listed, **default)
        try:
            values = read(args=arguments)
        except tyro_errors.MissingError as missing:
            # Of pydantic one hears about them and about all else that is wrong.
            values = read(args=[*map(stand_in, missing.flags), *arguments])
    try:
        return config_type.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_describe(error, flags)) from error


def _preset(preset: str | None = None) -> str | None:
    return preset


def _describe(error: ValidationError, flags: Mapping[Place, str]) -> str:
    """What pydantic found, in one line of ``--flag: rule (got value)``."""
    found: dict[str, str] = {}
    # Every member of a union says what is wrong; of those that want another type altogether nobody wants to hear.
    for item in sorted(error.errors(), key=lambda item: item["type"].endswith("_type")):
        place, message = item["loc"], item["msg"].removeprefix("Value error, ")
        flag = next((flag for path, flag in flags.items() if place[: len(path)] == path), None)
        if flag is not None:
            found.setdefault(flag, _rule(item))
            continue
        # A rule about several fields of a part begins with the one that it is about.
        for name in (path[-1] for path in flags if path[:-1] == place):
            message = message.replace(name, name.replace("_", "-"))
        name, _, message = message.partition(": ")
        found[spell([*place, name])] = message
    return "; ".join(f"{flag}: {rule}" for flag, rule in found.items())


def _rule(item: ErrorDetails) -> str:
    if item["type"] == "missing":
        return "missing"
    given = item["input"]
    word = shlex.quote(given) if isinstance(given, str) else repr(given)
    return f"{item['msg'].removeprefix('Value error, ').removeprefix('Input ')} (got {word})"
