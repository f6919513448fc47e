"""Bad input of the service: one line, status 2, before a Ray is started."""

import socket
from pathlib import Path

import pytest

from captioner.serving import run
from ray_jobs.serve import main
from tests.models import write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("models") / "model")


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        ([], {}, "model"),
        (["--model", "{tmp}/absent"], {}, "is not a model directory"),
        (["--model", "{model}", "--port", "{taken}"], {}, "Address already in use"),
        (["--model", "{model}", "--token-file", "{tmp}/absent"], {}, "cannot read"),
        (["--model", "{model}"], {"CAPTIONER_TOKENS": ""}, "CAPTIONER_TOKENS: there is no token"),
        (
            ["--model", "{model}", "--key", "x"],
            {},
            "--certificate: HTTPS takes certificate and key",
        ),
        (
            ["--model", "{model}", "--key", "{tmp}/x", "--certificate", "{tmp}/x"],
            {},
            "No such file",
        ),
        (["--model", "{model}"], {"RAY_SERVE_ENABLE_HA_PROXY": "1"}, "RAY_SERVE_ENABLE_HA_PROXY"),
        (["--model", "a={model}", "--model", "a={model}"], {}, "two are called 'a'"),
        (["--model", "{model}", "--token", "secret"], {}, "--token"),
    ],
)
def test_wrong_input_is_one_line_and_status_2_before_ray_starts(
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    variables: dict[str, str],
    message: str,
) -> None:
    monkeypatch.setattr(run, "start_ray", lambda: pytest.fail("Ray was started"))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        values = {"tmp": tmp_path, "model": model, "taken": taken.getsockname()[1]}
        monkeypatch.setattr("sys.argv", ["serve", *(text.format(**values) for text in arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_a_type_that_cannot_be_loaded_is_refused(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "has_loader", lambda name: False)
    monkeypatch.setattr("sys.argv", ["serve", "--model", model, "--types", "jpeg", "heic"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert "--types: heic takes the extra: pip install 'captioner[heif]'" in capsys.readouterr().err
