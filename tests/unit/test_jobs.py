"""Bad input of every job: one line, status 2 and nothing published, before a Ray is started."""

import importlib
from pathlib import Path

import pytest
import ray

from tests.models import write_model
from tests.stores import write_store


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a feature store and a model."""
    root = tmp_path_factory.mktemp("published")
    write_store(root / "features", {"train": 2, "validation": 2})
    write_model(root / "model")
    return root


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["extract_features", "--source", "{tmp}/absent"], "absent"),
        (["extract_features", "--source", "{tmp}/empty"], "empty"),
        (["train", "--features", "{tmp}/empty"], "not a feature store"),
        (["train", "--features", "{published}/model"], "not a feature store"),
        (["tune", "--features", "{tmp}/empty"], "not a feature store"),
        (["evaluate", "--features", "{published}/features", "--model", "{tmp}/empty"], "model"),
        (["evaluate", "--features", "{published}/features", "--model", "{published}/model",
          "--split", "tset"], "'train', 'validation' or 'test'"),
        (["caption", "--images", "{tmp}/absent.jpg", "--model", "{published}/model"], "absent.jpg"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_status_2_and_publishes_nothing(
    published: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    (tmp_path / "empty").mkdir()
    name, *rest = [text.format(tmp=tmp_path, published=published) for text in arguments]
    monkeypatch.setattr("sys.argv", [name, *rest, "--output", f"{tmp_path}/out"])
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was started"))
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(f"ray_jobs.{name}").main()
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not (tmp_path / "out").exists()
