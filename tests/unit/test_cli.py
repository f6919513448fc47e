"""Command lines: wrong values end in one line and status 2, before anything starts."""

import pytest

from captioner.config import EvaluateConfig, ExtractConfig, TrainConfig
from captioner.errors import ConfigError, SourceError
from captioner.presets import PRESETS
from captioner.runtime import command_line

MINIMAL = ["--source", "shapes", "--output", "x"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--encoder.layer", "layer5"], r"--encoder.layer.*'layer4', 'layer3'"),
        (
            ["--max-reject-fraction", "3"],
            r"--max-reject-fraction: .*less than or equal to 1 \(got 3",
        ),
        (["--limits.max-bytes", "0"], r"--limits.max-bytes: .*greater than or equal to 1 \(got 0"),
        (["--encoder.seed", "-1"], r"--encoder.seed: .*greater than or equal to 0 \(got -1"),
        (["--batch-size", "many"], r"--batch-size.*'many'"),
        (["--colour", "red"], "--colour"),
    ],
)
def test_wrong_value_names_field_value_and_rule_in_one_line(
    arguments: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        command_line.parse(ExtractConfig, MINIMAL + arguments)
    assert "\n" not in str(caught.value)


def test_missing_argument_is_named() -> None:
    with pytest.raises(ConfigError, match="--output"):
        command_line.parse(ExtractConfig, ["--source", "shapes"])


def test_contradicting_values_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"num-captions: 5 must be at most beam-size 3"):
        command_line.parse(
            EvaluateConfig,
            ["--features", "f", "--model", "m", "--output", "o"]
            + ["--decode.num-captions", "5", "--decode.beam-size", "3"],
        )


def test_nested_flags_reach_their_fields() -> None:
    config = command_line.parse(ExtractConfig, [*MINIMAL, "--encoder.weights", "random", "--grid"])
    assert config.encoder.weights == "random"
    assert config.grid


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
