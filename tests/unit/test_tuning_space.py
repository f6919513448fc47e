"""What a search tries is decided by its settings alone."""

from pathlib import Path

import pytest

from captioner.config import TuneConfig
from captioner.errors import StoreError
from captioner.tuning.clock import Clock
from captioner.tuning.search import run_search
from captioner.tuning.space import draw_trials, training_of
from tests.stores import write_store

BASE = TuneConfig(features="f", output="o")


def test_seed_space_is_the_notebooks_grid() -> None:
    trials = draw_trials(BASE, grid=True)
    assert [(trial["width"], trial["optimizer"]) for trial in trials] == [
        (512, "adam"), (512, "rmsprop"), (256, "adam"), (256, "rmsprop"), (128, "adam"), (128, "rmsprop"),
    ]  # fmt: skip
    assert {trial["dropout"] for trial in trials} == {0.5}


def test_wide_space_is_seeded_and_knows_the_store() -> None:
    wide = BASE.model_copy(update={"space": "wide", "num_samples": 40})
    trials = draw_trials(wide, grid=True)
    assert trials == draw_trials(wide, grid=True)
    assert trials != draw_trials(wide.model_copy(update={"seed": 1}), grid=True)
    # More samples later keep the first ones.
    assert draw_trials(wide.model_copy(update={"num_samples": 50}), grid=True)[:40] == trials
    assert {trial["decoder"] for trial in trials} == {
        "merge", "sequence_attention", "spatial_attention", "adaptive_attention", "transformer",
    }  # fmt: skip
    for trial in trials:
        assert trial["picture_layers"] == 0 or trial["decoder"] in (
            "adaptive_attention",
            "transformer",
        )
    for name, values in {
        "picture_layers": {0, 1, 2},
        "ensemble_size": {1, 2, 3},
        "ema_decay": {0.0, 0.99, 0.995},
    }.items():
        assert {trial[name] for trial in trials} == values
    chosen = wide.model_copy(update={"decoders": ("transformer",)})
    assert {trial["decoder"] for trial in draw_trials(chosen, grid=False)} == {"transformer"}
    without = {trial["decoder"] for trial in draw_trials(wide, grid=False)}
    assert without == {"merge", "sequence_attention"}


@pytest.mark.parametrize("space", ["notebook", "wide"])
def test_every_trial_is_a_valid_training_run(space: str) -> None:
    config = BASE.model_copy(update={"space": space, "metric": "cider", "max_epochs": 4})
    for trial in draw_trials(config, grid=True):
        training = training_of(config, trial, "out", threads=1)
        assert training.decoder.kind == trial["decoder"]
        assert training.optimizer.name == trial["optimizer"]
        assert (training.epochs, training.patience) == (4, None)
        assert training.validation_cider
        assert training.ema_decay == trial.get("ema_decay", 0.0)
        assert training.decoder.ensemble_size == trial.get("ensemble_size", 1)
        assert training.decoder.picture_layers == trial.get("picture_layers", 0)


def test_kinds_that_want_the_grid_on_a_store_without_one_are_one_line(tmp_path: Path) -> None:
    features = write_store(tmp_path / "features", {"train": 3, "validation": 3})
    output = tmp_path / "out"
    config = TuneConfig(
        features=features, output=str(output), space="wide", decoders=("merge", "transformer")
    )
    with pytest.raises(StoreError, match=r"holds no grid: extract with --grid for this decoder$"):
        run_search(config)
    assert not output.exists()


def test_time_is_counted_over_all_runs_of_a_search(tmp_path: Path) -> None:
    place = tmp_path / "seconds.json"
    place.write_text("50.0")
    clock = Clock(str(place))
    left = clock.left(1.0)
    assert left is not None
    assert 5 < left <= 10
    assert (clock.left(None), clock.left(0.5)) == (None, 0.0)
    clock.save()
    assert 50 <= float(place.read_text()) < 55
    Clock(str(tmp_path / "missing" / "seconds.json"))
