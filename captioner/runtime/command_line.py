"""Command lines: a configuration from the arguments, one library call, and exit statuses people can script with.

Status 0: published. 2: the input was wrong, and one line on stderr says which field, which value, what is allowed.
130: interrupted; nothing is published, and the same command goes on.

Every field of a configuration is a flag, one of a part with a dot: ``--encoder.layer layer3``. argparse takes the words
apart; what they mean and what is allowed is left to pydantic, as for every configuration that is made in Python.
"""

import argparse
import difflib
import errno
import logging
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticUndefined

from captioner.config import Config
from captioner.errors import CaptionerError, ConfigError

AnyConfig = TypeVar("AnyConfig", bound=Config)

_METAVARS = {int: "INT", float: "FLOAT", str: "TEXT"}


def run(
    job: Callable[[AnyConfig], object], config_type: type[AnyConfig], **parse_options: Any
) -> None:
    """Parse ``sys.argv`` into ``config_type``, call ``job`` with it, and turn user errors into status 2.

    Keyword arguments go to ``parse``.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    # What Ray Data logs as an error it raises as well; said once is enough.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    for noisy in ("ray.train", "httpx", "botocore", "fsspec", "huggingface_hub"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        job(parse(config_type, sys.argv[1:], **parse_options))
    except CaptionerError as error:
        fail(str(error))
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        raise SystemExit(130) from None
    except OSError as error:
        # A full disk or a missing permission is the user's to mend; anything else is our defect and keeps its trace.
        if error.errno in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT):
            fail(f"{os.strerror(error.errno)}: {error.filename or 'output'}")
        raise


def fail(message: str) -> NoReturn:
    """One line on stderr, exit status 2."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


def take_name(program: str, names: Mapping[str, str]) -> str:
    """Take the first argument, one of ``names`` (with a line of help each), from ``sys.argv``; the rest is for ``run``.

    Ends with status 0 after ``--help``, with status 2 where the name is missing or another.
    """
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in ("-h", "--help"):
        width = max(map(len, names))
        lines = [f"  {name:{width}}  {text}" for name, text in names.items()]
        print("\n".join([f"usage: {program} NAME ..., NAME --help for more", "", *lines]))
        raise SystemExit(0)
    if name not in names:
        fail(f"{program}: {shlex.quote(name)} is not one of {', '.join(names)}")
    sys.argv[:2] = [f"{program} {name}"]
    return name


def parse(
    config_type: type[AnyConfig],
    arguments: Sequence[str],
    *,
    presets: Mapping[str, Callable[[], AnyConfig]] | None = None,
    positional: str | None = None,
) -> AnyConfig:
    """Configuration from command-line arguments.

    Args:
        presets: ``--preset NAME`` gives the defaults that the other flags override.
        positional: the field that is given without its flag.

    Raises:
        ConfigError: a value is wrong; the message names the field, the value and what is allowed.
        SystemExit: ``--help`` was asked for.
    """
    before, defaults = _Parser(add_help=False, allow_abbrev=False), None
    if presets is not None:
        names = ", ".join(presets)
        before.add_argument("--preset", metavar="NAME", help=f"Other defaults: {names}.")
        preset = before.parse_known_args(arguments)[0].preset
        if preset not in (None, *presets):
            raise ConfigError(f"--preset: {preset!r} is not one of {names}")
        defaults = presets[preset]() if preset else None
    flags = list(_flags(config_type, defaults, positional))
    parser = _build_parser(config_type, flags, before)
    found, unknown = parser.parse_known_args(arguments)
    if unknown:
        known = [flag.name.strip("-") for flag in flags]
        close = difflib.get_close_matches(unknown[0].strip("-"), known, 1, 0.7)
        hint = f"did you mean --{close[0]}?" if close else "--help lists the flags"
        raise ConfigError(f"{' '.join(unknown)} is not known: {hint}")
    values: dict[str, Any] = {}
    for flag in flags:
        value = flag.read(found) if flag.name in found else flag.default
        if value is not PydanticUndefined:
            part = values
            for name in flag.path[:-1]:
                part = part.setdefault(name, {})
            part[flag.path[-1]] = value
    try:
        return config_type.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_describe(error, flags)) from error


@dataclass(frozen=True)
class _Flag:
    """A field of a configuration or of one of its parts."""

    name: str
    """As it is spelled: ``--encoder.layer``, or ``uri`` where it is positional."""
    path: tuple[str, ...]
    """Names of the parts it is in, and its own."""
    field: FieldInfo
    default: Any
    about: str
    """What the part is for."""

    @property
    def types(self) -> list[Any]:
        return list(_members(self.field.annotation))

    def read(self, found: argparse.Namespace) -> Any:
        """The value for pydantic to look at."""
        value = getattr(found, self.name)
        if NoneType in self.types and str(value).lower() == "none":
            return None
        # One word is a tuple of one only where it cannot be anything else.
        if isinstance(value, list) and len(value) == 1 and len(self.types) > 1:
            return value[0]
        return value

    def add_to(self, parser: Any) -> None:
        """Declare it to a parser or to a group of one."""
        text, shown = self.field.description or "", self.default
        if isinstance(shown, tuple):
            shown = " ".join(str(part) for part in shown)
        if shown is PydanticUndefined:
            text += " (required)"
        elif shown is not None:
            text += f" (default: {shown})"
        options: dict[str, Any] = {"help": text.replace("%", "%%"), "default": argparse.SUPPRESS}
        # None is required of the parser: what is missing pydantic says, and all of it at once.
        types = [kind for kind in self.types if kind is not NoneType]
        if types == [bool]:
            options["action"] = argparse.BooleanOptionalAction
        else:
            tuples = [kind for kind in types if get_origin(kind) is tuple]
            options["metavar"] = _metavar(get_args(tuples[0])[0] if tuples else types[0])
            if tuples:
                options |= {"nargs": "+", "action": "extend"}
        if self.name.startswith("--"):
            parser.add_argument(self.name, dest=self.name, **options)
        else:
            parser.add_argument(self.name, nargs="?", **options)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message.removeprefix("argument "))


def _build_parser(config_type: type[Config], flags: list[_Flag], before: _Parser) -> _Parser:
    required = [flag.name for flag in flags if flag.default is PydanticUndefined]
    parser = _Parser(
        usage=" ".join(["%(prog)s", *required, "..."]),
        description=config_type.__doc__,
        parents=[before],
        allow_abbrev=False,
    )
    groups: dict[tuple[str, ...], Any] = {(): parser}
    for flag in flags:
        part = flag.path[:-1]
        if part not in groups:
            groups[part] = parser.add_argument_group(_dashed(part), flag.about)
        flag.add_to(groups[part])
    return parser


def _flags(
    config_type: type[Config],
    defaults: Config | None,
    positional: str | None,
    path: tuple[str, ...] = (),
    about: str = "",
) -> Iterator[_Flag]:
    for name, field in config_type.model_fields.items():
        default = field.default if defaults is None else getattr(defaults, name)
        place = (*path, field.alias or name)
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Config):
            inner = default if isinstance(default, Config) else None
            text = field.description or kind.__doc__ or ""
            yield from _flags(kind, inner, None, place, text)
        else:
            spelled = name if name == positional else f"--{_dashed(place)}"
            yield _Flag(spelled, place, field, default, about)


def _members(annotation: Any) -> Iterator[Any]:
    """The types that a union allows, without their limits."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _members(get_args(annotation)[0])
    elif origin in (Union, UnionType):
        for member in get_args(annotation):
            yield from _members(member)
    else:
        yield annotation


def _metavar(annotation: Any) -> str:
    kind = next(_members(annotation))
    if get_origin(kind) is Literal:
        return f"{{{','.join(get_args(kind))}}}"
    return _METAVARS[kind]


def _dashed(path: Sequence[object]) -> str:
    return ".".join(str(part) for part in path).replace("_", "-")


def _describe(error: ValidationError, flags: list[_Flag]) -> str:
    """What pydantic found, in one line of ``--flag: rule (got value)``."""
    found: dict[str, str] = {}
    # Every member of a union says what is wrong; of those that want another type altogether nobody wants to hear.
    for item in sorted(error.errors(), key=lambda item: item["type"].endswith("_type")):
        place, message = item["loc"], item["msg"].removeprefix("Value error, ")
        flag = next((flag for flag in flags if place[: len(flag.path)] == flag.path), None)
        if flag is not None:
            found.setdefault(flag.name, _rule(item))
            continue
        # A rule about several fields of a part begins with the one that it is about.
        for name in (flag.path[-1] for flag in flags if flag.path[:-1] == place):
            message = message.replace(name, _dashed([name]))
        name, _, message = message.partition(": ")
        found[f"--{_dashed([*place, name])}"] = message
    return "; ".join(f"{name}: {rule}" for name, rule in found.items())


def _rule(item: ErrorDetails) -> str:
    if item["type"] == "missing":
        return "missing"
    given = item["input"]
    word = shlex.quote(given) if isinstance(given, str) else repr(given)
    return f"{item['msg'].removeprefix('Value error, ').removeprefix('Input ')} (got {word})"
