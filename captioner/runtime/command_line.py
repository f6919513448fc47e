"""Command lines: a configuration from the arguments, one library call, and exit statuses people can script with.

Status 0: published. 2: the input was wrong, and one line on stderr says which field, which value, what is allowed.
130: interrupted; nothing is published, and the same command goes on.
"""

import contextlib
import errno
import io
import logging
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

import tyro
from pydantic import ValidationError

from captioner.config import Config
from captioner.errors import CaptionerError, ConfigError

AnyConfig = TypeVar("AnyConfig", bound=Config)


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
    remaining = list(arguments)
    options: dict[str, Any] = {}
    if presets is not None:
        name, remaining = _take_preset(remaining)
        if name is not None:
            if name not in presets:
                raise ConfigError(f"--preset: {name!r} is not one of {', '.join(presets)}")
            options["default"] = presets[name]()
        options["description"] = (
            f"{config_type.__doc__}\n\n--preset NAME gives other defaults: {', '.join(presets)}"
        )
    captured = io.StringIO()
    try:
        # A wide terminal keeps tyro's message on one line, to be taken out of its box below.
        with contextlib.redirect_stderr(captured), _columns(4000, unless="--help" in remaining):
            parsed: AnyConfig = tyro.cli(config_type, args=remaining, **options)
            return parsed
    except ValidationError as error:
        raise ConfigError(describe(error)) from error
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise ConfigError(_unbox(captured.getvalue())) from None


def describe(error: ValidationError) -> str:
    """A pydantic error as one line of ``field: value is wrong because``."""
    lines = []
    for item in error.errors():
        field = ".".join(str(part) for part in item["loc"]) or "configuration"
        value = "" if isinstance(item["input"], dict) else f" (got {item['input']!r})"
        lines.append(f"{field}: {item['msg'].removeprefix('Value error, ')}{value}")
    return "; ".join(lines)


def _take_preset(arguments: list[str]) -> tuple[str | None, list[str]]:
    for position, argument in enumerate(arguments):
        if argument.startswith("--preset="):
            return argument.partition("=")[2], arguments[:position] + arguments[position + 1 :]
        if argument == "--preset":
            if position + 1 == len(arguments):
                raise ConfigError("--preset: a name is missing")
            return arguments[position + 1], arguments[:position] + arguments[position + 2 :]
    return None, arguments


@contextlib.contextmanager
def _columns(width: int, *, unless: bool) -> Any:
    before = os.environ.get("COLUMNS")
    if not unless:
        os.environ["COLUMNS"] = str(width)
    try:
        yield
    finally:
        if not unless:
            if before is None:
                del os.environ["COLUMNS"]
            else:
                os.environ["COLUMNS"] = before


def _unbox(box: str) -> str:
    """The message inside one of tyro's boxes, as one line."""
    lines = [line.strip(" │") for line in box.splitlines()]
    body = []
    for line in lines:
        if line.startswith("───"):
            break
        if not line.startswith(("╭", "╰")):
            body.append(line)
    text = " ".join(" ".join(body).split())
    # A pydantic error arrives as text: keep the field, the rule and the value.
    found = re.search(
        r"^Error parsing (?P<group>[\w.-]+): \d+ validation errors? for (?P<model>\w+) "
        r"(?:Value error, (?P<message>.*?)|(?P<field>[\w.]+) (?P<rule>.*?)) "
        r"\[type=[\w.]+, input_value=(?P<value>.*?), input_type",
        text,
    )
    if found:
        group = "" if found["group"].endswith("Config") else found["group"] + "."
        if found["message"]:
            return f"--{group}{found['message']}".replace("_", "-")
        return (
            f"--{group}{found['field']}".replace("_", "-")
            + f": {found['rule']} (got {found['value']})"
        )
    return re.sub(r"^Missing from \S+?: ?", "missing: ", text)
