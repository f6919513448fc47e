"""What a search tries is decided by its settings alone."""

import pytest

from captioner.config import TuneConfig
from captioner.tuning.space import draw_trials, training_of

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
