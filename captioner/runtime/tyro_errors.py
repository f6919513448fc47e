"""What tyro does not offer in public, and yet is needed: an error that says what is wrong with the arguments.

Without it tyro prints a box of many lines and ends the process. ``tyro._errors`` says of itself that it may be gone in
any release and that tyro is to be pinned, as pyproject.toml does; tests/unit/test_tyro_errors.py says what then no
longer holds.
"""

import contextlib
import difflib
from collections.abc import Collection, Iterator, Sequence

from tyro import _errors

from captioner.errors import ConfigError


class MissingError(Exception):
    """Required flags are missing."""

    def __init__(self, flags: list[str]) -> None:
        super().__init__(*flags)
        self.flags = flags


@contextlib.contextmanager
def raised(arguments: Sequence[str], known: Collection[str]) -> Iterator[None]:
    """While the block runs, arguments that tyro refuses raise ``ConfigError``, in one line, or ``MissingError``.

    Args:
        arguments: as they were written.
        known: all flags, from which one that is not is guessed.
    """

    def refuse(event: _errors.ParseErrorEvent) -> None:
        # What tyro may come to refuse beyond these ends in its box, and in status 2 as well.
        if isinstance(event, _errors.UnrecognizedArgs):
            unknown([word if word in arguments else attached(word) for word in event.tokens])
        if isinstance(event, _errors.MissingArgs):
            raise MissingError([given.arg.display_name() for given in event.missing_arguments])
        if isinstance(event, _errors.BadValue):
            # What no flag is may have taken the word that a positional argument lacks.
            if not event.argument.display_name().startswith("-"):
                unknown([word for word in arguments if word.startswith("--") and not is_flag(word)])
            raise ConfigError(f"{event.argument.display_name()}: a value is missing")

    def unknown(words: list[str]) -> None:
        if not words:
            return
        name, _, value = words[0].partition("=")
        if value and is_flag(name):
            raise ConfigError(f"{words[0]}: {name} takes no value")
        close = difflib.get_close_matches(name, known, 1, 0.7)
        hint = f"did you mean {close[0]}?" if close else "--help lists the flags"
        if name.removeprefix("--") in known:
            hint = f"give {name.removeprefix('--')} without a flag"
        raise ConfigError(f"{' '.join(words)} is not known: {hint}")

    def is_flag(word: str) -> bool:
        name = word.partition("=")[0].replace("_", "-")
        return name in known or name.replace("--no-", "--", 1) in known

    # Of --flag=value tyro names the value alone where the flag takes none.
    def attached(value: str) -> str:
        return next((word for word in arguments if word.endswith(f"={value}")), value)

    with _errors.on_parse_error(refuse):
        yield
