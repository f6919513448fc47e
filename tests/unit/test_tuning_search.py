"""Whether a killed search can be restored: Tune leaves files before it has noted a trial."""

import json
from pathlib import Path

from captioner import storage
from captioner.artifacts.output import Output
from captioner.tuning.search import SEARCH, _has_begun


def test_a_search_goes_on_only_from_noted_trials(tmp_path: Path) -> None:
    with Output(str(tmp_path / "out"), {"job": "tune"}) as output:
        assert not _has_begun(output)
        storage.write_bytes(output.work(SEARCH, "tuner.pkl"), b"of Tune's")
        assert not _has_begun(output)
        for hour, trials in enumerate(([], [["one", "of a trial"]])):
            name = f"experiment_state-2026-11-28_0{hour}-00-00.json"
            state = json.dumps({"trial_data": trials}).encode()
            storage.write_bytes(output.work(SEARCH, name), state)
            assert _has_begun(output) is bool(trials)
