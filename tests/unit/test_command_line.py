"""Command lines: wrong values end in one line and status 2, before anything starts."""

import errno
import re
from typing import Annotated

import pytest
import tyro
from pydantic import Field

from captioner.config import (
    Config,
    EvaluateConfig,
    ExtractConfig,
    ImageLimits,
    ServeConfig,
    TrainConfig,
)
from captioner.errors import ConfigError, OutOfReachError, SourceError
from captioner.presets import PRESETS
from captioner.runtime import command_line

MINIMAL = ["--source", "shapes", "--output", "x"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--encoder.layer", "layer5"], "--encoder.layer: should be .*'layer4'.* (got layer5)"),
        (
            ["--max-reject-fraction", "3"],
            "--max-reject-fraction: .*less than or equal to 1 (got 3)",
        ),
        (["--limits.max-bytes", "0"], "--limits.max-bytes: .*greater than or equal to 1 (got 0)"),
        (["--encoder.seed", "-1"], "--encoder.seed: .*greater than or equal to 0 (got -1)"),
        (["--batch-size", "many"], "--batch-size: should be a valid integer.* (got many)"),
        (["--batch-size", ""], "--batch-size: should be a valid integer.* (got '')"),
        (["--batch-size"], "--batch-size: a value is missing"),
        (["--batch-size", "--grid"], "--batch-size: a value is missing"),
        (["--grid=yes"], "--grid=yes: --grid takes no value"),
        (["--colour", "red"], "--colour red is not known: --help lists the flags"),
        (["--ouput=x"], "--ouput=x is not known: did you mean --output?"),
        (["--layer", "layer3"], "--layer layer3 is not known: --help lists the flags"),
        (["--encoder.layers", "layer3"], "--encoder.layers layer3 .*did you mean --encoder.layer?"),
        (["photos"], "photos is not known: --help lists the flags"),
    ],
)
def test_wrong_value_names_field_value_and_rule_in_one_line(
    arguments: list[str], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        command_line.parse(ExtractConfig, MINIMAL + arguments)
    escaped = re.escape(message).replace(re.escape(".*"), ".*")
    assert re.fullmatch(escaped, str(caught.value)), caught.value


def test_all_that_is_wrong_is_said_at_once() -> None:
    arguments = ["--source", "shapes", "--batch-size", "0", "--source-options.limit", "x"]
    with pytest.raises(ConfigError) as caught:
        command_line.parse(ExtractConfig, arguments)
    found = str(caught.value)
    assert [part.partition(": ")[0] for part in found.split("; ")] == [
        "--output",
        "--source-options.limit",
        "--batch-size",
    ]
    assert "--output: missing" in found
    assert "\n" not in found
    with pytest.raises(ConfigError, match="^--output: missing$"):
        command_line.parse(ExtractConfig, ["--source=shapes", "--"])


def test_of_a_union_the_nearest_member_says_what_is_wrong() -> None:
    base = ["--features", "f", "--output", "o", "--num-workers"]
    with pytest.raises(ConfigError, match=r"^--num-workers: .*equal to 1 \(got 0\)$"):
        command_line.parse(TrainConfig, [*base, "0"])
    with pytest.raises(ConfigError, match=r"^--num-workers: .*valid integer.* \(got x\)$"):
        command_line.parse(TrainConfig, [*base, "1", "x"])
    with pytest.raises(ConfigError, match="^--num-workers: missing$"):
        command_line.parse(TrainConfig, base)


def test_contradicting_values_are_refused() -> None:
    with pytest.raises(ConfigError, match="^--decode.num-captions: 5 must be at most beam-size 3$"):
        command_line.parse(
            EvaluateConfig,
            ["--features", "f", "--model", "m", "--output", "o"]
            + ["--decode.num-captions", "5", "--decode.beam-size", "3"],
        )


def test_nested_flags_reach_their_fields() -> None:
    config = command_line.parse(ExtractConfig, [*MINIMAL, "--encoder.weights", "random", "--grid"])
    assert config.encoder.weights == "random"
    assert config.grid
    assert not command_line.parse(ExtractConfig, [*MINIMAL, "--no-grid"]).grid


def test_parts_keep_the_defaults_they_have_in_a_job() -> None:
    config = command_line.parse(ServeConfig, ["--model", "m", "--limits.max-pixels", "9"])
    assert config.limits == ImageLimits(max_bytes=16 * 2**20, max_pixels=9)


def test_a_flag_is_repeated_or_takes_several_values() -> None:
    config = command_line.parse(
        ServeConfig, ["--model", "a=x", "--types", "png", "webp", "--model=b"]
    )
    assert config.model == ("a=x", "b")
    assert config.types == ("png", "webp")
    assert command_line.parse(ServeConfig, ["--model=a", "--types=png"]).types == ("png",)
    with pytest.raises(ConfigError, match="^--model: missing$"):
        command_line.parse(ServeConfig, [])


def test_none_is_a_value_where_the_field_has_it() -> None:
    base = ["--preset", "demo"]
    config = command_line.parse(TrainConfig, [*base, "--patience", "None"], presets=PRESETS)
    assert config.patience is None
    with pytest.raises(ConfigError, match=r"--epochs: should be a valid integer.*\(got None\)"):
        command_line.parse(TrainConfig, [*base, "--epochs", "None"], presets=PRESETS)


def test_a_positional_field_is_given_without_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    class Folder(Config):
        """A folder."""

        uri: tyro.conf.Positional[str]
        """Where it is."""
        deep: bool = False
        """How to look."""

    given = command_line.parse(Folder, ["--deep", "photos"])
    assert given == Folder(uri="photos", deep=True)
    with pytest.raises(ConfigError, match="^uri: missing$"):
        command_line.parse(Folder, [])
    with pytest.raises(ConfigError, match="^more is not known: --help lists the flags$"):
        command_line.parse(Folder, ["photos", "more"])
    with pytest.raises(SystemExit):
        command_line.parse(Folder, ["--help"])
    assert "URI" in capsys.readouterr().out


def test_a_field_may_be_called_otherwise_on_the_command_line() -> None:
    class Report(Config):
        """A report."""

        json_file: Annotated[int, Field(alias="json")] = 0
        """Where it is written."""

    assert command_line.parse(Report, ["--json", "7"]).json_file == 7
    with pytest.raises(ConfigError, match=r"^--json: .*\(got x\)$"):
        command_line.parse(Report, ["--json", "x"])


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_parses_and_yields_to_flags(name: str) -> None:
    plain = command_line.parse(TrainConfig, ["--preset", name], presets=PRESETS)
    assert plain == PRESETS[name]()
    changed = command_line.parse(
        TrainConfig, [f"--preset={name}", "--decoder.width", "64"], presets=PRESETS
    )
    assert changed == plain.model_copy(
        update={"decoder": plain.decoder.model_copy(update={"width": 64})}
    )


def test_unknown_preset_lists_the_known() -> None:
    with pytest.raises(ConfigError, match="^--preset: a value is missing$"):
        command_line.parse(TrainConfig, ["--preset"], presets=PRESETS)
    with pytest.raises(ConfigError, match="notebook_merge"):
        command_line.parse(TrainConfig, ["--preset", "nothing"], presets=PRESETS)


def test_user_error_is_one_line_and_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def job(config: ExtractConfig) -> None:
        raise SourceError("nothing\nthere")

    monkeypatch.setattr("sys.argv", ["job", *MINIMAL])
    with pytest.raises(SystemExit) as stop:
        command_line.run(job, ExtractConfig)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: nothing there\n"


def test_help_ends_with_status_0_and_names_units(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["job", "--help"])
    with pytest.raises(SystemExit) as stop:
        command_line.run(print, ExtractConfig)
    assert stop.value.code == 0
    assert "in bytes" in capsys.readouterr().out


def test_help_of_a_preset_shows_its_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, kind in (
        ([], "merge"),
        (["--preset", "flickr8k_best"], PRESETS["flickr8k_best"]().decoder.kind),
    ):
        with pytest.raises(SystemExit) as stop:
            command_line.parse(TrainConfig, [*arguments, "--help"], presets=PRESETS)
        assert stop.value.code == 0
        shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
        assert f"the grid. (default: {kind})" in shown
        assert "--preset NAME" in shown


def test_workers_are_one_number_or_a_range_in_order() -> None:
    base = ["--features", "f", "--output", "o"]
    assert command_line.parse(TrainConfig, base).worker_range == (1, 1)
    assert command_line.parse(TrainConfig, [*base, "--num-workers", "3"]).worker_range == (3, 3)
    assert command_line.parse(TrainConfig, [*base, "--num-workers", "1", "4"]).worker_range == (
        1,
        4,
    )
    with pytest.raises(ConfigError, match="the first of 4 1 must not be the larger"):
        command_line.parse(TrainConfig, [*base, "--num-workers", "4", "1"])


@pytest.mark.parametrize(
    "error",
    [
        OutOfReachError("s3://bucket cannot be reached"),
        OSError("s3://bucket\n cannot be reached: AWS Error SLOW_DOWN during GetObject operation"),
        OSError(errno.ESTALE, "of the system"),
    ],
)
def test_what_is_out_of_reach_is_told_apart_from_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    def job(config: ExtractConfig) -> None:
        raise error

    monkeypatch.setattr("sys.argv", ["extract_features", *MINIMAL])
    with pytest.raises(SystemExit) as stop:
        command_line.run(job, ExtractConfig)
    assert stop.value.code == 75
    assert re.fullmatch(
        r"error: (s3://bucket cannot be reached.*|Stale file handle)\n", capsys.readouterr().err
    )
