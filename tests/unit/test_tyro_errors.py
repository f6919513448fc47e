"""tyro's private errors are still there and still say what is needed."""

import tomllib
from importlib.metadata import version

import pytest
import tyro

from captioner.errors import ConfigError
from captioner.runtime import tyro_errors
from tests.head import ROOT


def count(number: int, plain: bool = False) -> int:
    return number


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--number=1", "--nubmer", "1"], "--nubmer 1 is not known: did you mean --number?"),
        (["--number"], "--number: a value is missing"),
        (["--number=1", "2"], "2 is not known: --help lists the flags"),
        (["--number=1", "--fast=1"], "--fast=1 is not known: --help lists the flags"),
        (["--number=1", "1"], "1 is not known: --help lists the flags"),
        (["--number=1", "--plain=yes"], "--plain=yes: --plain takes no value"),
    ],
)
def test_what_tyro_refuses_is_raised_and_not_printed(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with (
        pytest.raises(ConfigError) as caught,
        tyro_errors.raised(arguments, ["--number", "--plain"]),
    ):
        tyro.cli(count, args=arguments)
    assert str(caught.value) == message
    assert capsys.readouterr() == ("", "")


def test_all_that_is_missing_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    def divide(number: int, by: int) -> float:
        return number / by

    with pytest.raises(tyro_errors.MissingError) as caught, tyro_errors.raised([], []):
        tyro.cli(divide, args=["--colour=red"])
    assert caught.value.flags == ["--number", "--by"]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--uri", "a"], "--uri is not known: give uri without a flag"),
        (["--colour", "red"], "--colour is not known: --help lists the flags"),
        (["--fast", "--plian", "a"], "--plian is not known: did you mean --plain?"),
        (["a", "--no-fast", "--plain"], "--plain: a value is missing"),
    ],
)
def test_a_flag_that_is_not_known_comes_before_the_value_it_has_taken(
    arguments: list[str], message: str
) -> None:
    def check(uri: tyro.conf.Positional[str], fast: bool = False, plain: str = "") -> str:
        return uri

    known = ["uri", "--fast", "--plain"]
    with pytest.raises(ConfigError) as caught, tyro_errors.raised(arguments, known):
        tyro.cli(check, args=arguments, config=[tyro.conf.PositionalMetavarFromFieldName])
    assert str(caught.value) == message


def test_what_is_not_known_yet_ends_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop, tyro_errors.raised(["--number=x"], []):
        tyro.cli(count, args=["--number=x"])
    assert stop.value.code == 2
    assert "--number" in capsys.readouterr().err


def test_tyro_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"tyro=={version('tyro')}" in project["dependencies"]
