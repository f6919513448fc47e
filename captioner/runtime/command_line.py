"""Command lines: a configuration from the arguments, one library call, and exit statuses people can script with.

Status 0: published. 2: the input was wrong, and one line on stderr says which field, which value, what is allowed.
130: interrupted; nothing is published, and the same command goes on.

Every field of a configuration is a flag, one of a part with a dot: ``--encoder.layer layer3``. tyro reads the words;
what is allowed is left to pydantic, which says all that is wrong with a configuration at once.
"""

import dataclasses
import errno
import functools
import logging
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, NoReturn, TypeGuard, TypeVar, get_type_hints

import tyro
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from tyro.constructors import (
    MISSING_NONPROP,
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from captioner.config import Config
from captioner.errors import CaptionerError, ConfigError
from captioner.runtime import tyro_errors

AnyConfig = TypeVar("AnyConfig", bound=Config)
Place = tuple[str, ...]

# What stands for a missing value: a word that no argument can be, and what tyro makes of no flag that may be repeated.
_ABSENT = ("\0", ())


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
) -> AnyConfig:
    """Configuration from command-line arguments.

    With ``presets``, ``--preset NAME`` gives the defaults that the other flags override.

    Raises:
        ConfigError: a value is wrong; the message names the field, the value and what is allowed.
        SystemExit: ``--help`` was asked for.
    """
    flags = dict(_flags(config_type))
    registry = ConstructorRegistry()
    registry.struct_rule(_part)
    read = functools.partial(
        tyro.cli,
        config_type,
        prog=os.path.basename(sys.argv[0]),
        config=[tyro.conf.PositionalMetavarFromFieldName],
        registry=registry,
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
            values = read(args=[*map(_stand_in, missing.flags), *arguments])
    try:
        return config_type.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_describe(error, flags)) from error


def _preset(preset: str | None = None) -> str | None:
    return preset


def _flags(config_type: type[Config], part: Place = ()) -> Iterator[tuple[Place, str]]:
    """Where each value belongs, the parts first, and what it is called on the command line."""
    for name, field in config_type.model_fields.items():
        path = (*part, field.alias or name)
        if _is_part(field.annotation):
            yield from _flags(field.annotation, path)
        else:
            yield path, name if tyro.conf.Positional in field.metadata else _flag(path)


def _flag(path: Sequence[object]) -> str:
    return "--" + ".".join(map(str, path)).replace("_", "-")


def _is_part(annotation: Any) -> TypeGuard[type[Config]]:
    return isinstance(annotation, type) and issubclass(annotation, Config)


def _part(info: StructTypeInfo) -> StructConstructorSpec | None:
    """tyro's rule for a configuration and its parts: it only collects, and pydantic looks at everything at once."""
    if not _is_part(info.type):
        return None
    types = get_type_hints(info.type, include_extras=True)
    fields = []
    for name, field in info.type.model_fields.items():
        kind, text = types[name], field.description or ""
        default = MISSING_NONPROP if field.is_required() else field.default
        if isinstance(info.default, Config):
            default = getattr(info.default, name)
        if _is_part(field.annotation):
            text = text or field.annotation.__doc__ or ""
        else:
            kind = _as_written(kind)
        fields.append(StructFieldSpec(field.alias or name, kind, default, " ".join(text.split())))

    def collect(**values: Any) -> dict[str, Any]:
        return {name: value for name, value in values.items() if value not in _ABSENT}

    collect.__doc__ = info.type.__doc__
    return StructConstructorSpec(collect, tuple(fields))


def _stand_in(flag: str) -> str:
    return f"{flag}={_ABSENT[0]}" if flag.startswith("--") else _ABSENT[0]


def _as_written(annotation: Any) -> Any:
    """The type as tyro shows it, with its words left as they are."""
    spec = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(annotation, set()))
    assert isinstance(spec, PrimitiveConstructorSpec), annotation

    def read(words: list[str]) -> Any:
        if words == ["None"] and spec.is_instance(None):
            return None
        return words[0] if len(words) == 1 and spec.nargs != "*" else words

    return Annotated[annotation, dataclasses.replace(spec, instance_from_str=read, choices=None)]


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
        found[_flag([*place, name])] = message
    return "; ".join(f"{flag}: {rule}" for flag, rule in found.items())


def _rule(item: ErrorDetails) -> str:
    if item["type"] == "missing":
        return "missing"
    given = item["input"]
    word = shlex.quote(given) if isinstance(given, str) else repr(given)
    return f"{item['msg'].removeprefix('Value error, ').removeprefix('Input ')} (got {word})"
