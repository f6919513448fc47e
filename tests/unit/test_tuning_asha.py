"""A search that was killed decides about its trials as one that was not."""

from types import SimpleNamespace

import numpy as np
import pytest

from captioner.config import TuneConfig
from captioner.tuning.asha import RememberingASHA

EPOCHS, TRIALS = 9, 8
METRIC = "validation_loss"


def config(**changes: int) -> TuneConfig:
    return TuneConfig(features="f", output="o", max_epochs=EPOCHS, **changes)  # type: ignore[arg-type]


def losses(seed: int) -> list[list[float]]:
    """Curves that fall and cross."""
    generator = np.random.default_rng(seed)
    ends, speeds = generator.uniform(2, 4, TRIALS), generator.uniform(0.2, 1.5, TRIALS)
    return [
        [float(end + 3 * np.exp(-speed * epoch)) for epoch in range(1, EPOCHS + 1)]
        for end, speed in zip(ends, speeds, strict=True)
    ]


def search(
    curves: list[list[float]], killed_at: int | None = None, *, decided: bool = True
) -> dict[int, int]:
    """Epochs of the trials that a serial search stops.

    Args:
        killed_at: number of the epoch, of all trials together, after which it is killed and started again.
        decided: whether that epoch was decided upon before the kill.
    """
    stopped: dict[int, int] = {}
    done: dict[int, list[tuple[int, float]]] = {number: [] for number in range(TRIALS)}
    total = 0

    def scheduler() -> RememberingASHA:
        over = {n for n in done if n in stopped or len(done[n]) == EPOCHS}
        known = {n: curve if n in over else curve[:-1] for n, curve in done.items()}
        return RememberingASHA(config(), METRIC, "min", known, stopped.__setitem__)

    asha = scheduler()
    for number, curve in enumerate(curves):
        trial = SimpleNamespace(config={"trial": {"number": number}})
        for epoch, loss in enumerate(curve, 1):
            total += 1
            done[number].append((epoch, loss))
            result = {"epoch": epoch, METRIC: loss}
            if total != killed_at or decided:
                decision = asha.on_trial_result(None, trial, result)
            if total == killed_at:
                asha = scheduler()
                if number not in stopped:
                    decision = asha.on_trial_result(None, trial, result)
            assert (decision == "STOP") == (number in stopped) or number in stopped
            if number in stopped:
                break
    return stopped


@pytest.mark.parametrize("seed", range(4))
def test_a_serial_search_killed_after_any_epoch_stops_the_same_trials(seed: int) -> None:
    curves = losses(seed)
    unbroken = search(curves)
    assert 2 <= len(unbroken) < TRIALS
    epochs = sum(unbroken.get(number, EPOCHS) for number in range(TRIALS))
    for killed_at in range(1, epochs + 1):
        assert search(curves, killed_at) == unbroken
        assert search(curves, killed_at, decided=False) == unbroken


def test_rungs_are_needed_for_that() -> None:
    """An ASHA that forgot would let the first trial after the kill go on, whatever it is."""
    asha = RememberingASHA(config(), METRIC, "min", {}, lambda *_: None)
    assert asha.judge(5, 1, 99.0) == "CONTINUE"
    asha = RememberingASHA(config(), METRIC, "min", {0: [(1, 1.0)], 1: [(1, 1.1)]}, lambda *_: None)
    assert asha.judge(5, 1, 99.0) == "STOP"


def test_last_epoch_and_trials_without_results_are_left_alone() -> None:
    stopped: dict[int, int] = {}
    known = {0: [(1, 1.0), (3, 1.0), (9, 1.0)]}
    asha = RememberingASHA(config(), METRIC, "min", known, stopped.__setitem__)
    trial = SimpleNamespace(config={"trial": {"number": 1}})
    assert asha.on_trial_result(None, trial, {"done": True}) == "CONTINUE"
    assert asha.on_trial_result(None, trial, {"epoch": 9, METRIC: 5.0}) == "CONTINUE"
    assert not stopped
    assert asha.on_trial_result(None, trial, {"epoch": 4, METRIC: 5.0}) == "STOP"
    assert stopped == {1: 4}
