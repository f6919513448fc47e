"""The table of a search fits a terminal."""

import pytest

from captioner.config import TuneConfig
from captioner.tuning.publish import SearchResult
from captioner.tuning.space import draw_trials
from captioner.tuning.trials import Trial


@pytest.mark.parametrize("metric", ["validation_loss", "validation_cider"])
def test_table_of_a_wide_search_is_read_at_80_columns(metric: str) -> None:
    config = TuneConfig(features="f", output="o", space="wide", num_samples=12)
    trials = [
        Trial(number, drawn, "finished", [(1, 3.0 - number / 10)], 12345.0)
        for number, drawn in enumerate(draw_trials(config, grid=True))
    ]
    trials[3] = Trial(3, trials[3].hyperparameters, "failed", [], 0.0, "store " * 50)
    table = SearchResult("runs/search", metric, 11, trials).table()
    lines = table.splitlines()
    assert max(map(len, lines)) <= 80
    # The best first, the one without an epoch last.
    numbered = [line.split()[0] for line in lines[1:] if line[:1].isdecimal()]
    assert len(numbered) == 12 + 1  # and the sum at the end
    largest = metric == "validation_cider"
    assert numbered[0] == ("0" if largest else "11*")
    assert numbered[11] == "3"
    assert all(name in table for name in ("learning_rate", "ensemble_size", "store store"))
