"""Rules of the configuration models that the command line alone does not show."""

import pytest
from pydantic import ValidationError

from captioner import config
from captioner.config import DecodeConfig, DecodeOverrides
from ray_jobs.__main__ import JOBS

OWN = DecodeConfig(beam_size=4, num_captions=2, length_penalty=1.0, mbr_samples=9)


@pytest.mark.parametrize(
    ("asked", "changed"),
    [
        ({}, {}),
        ({"mbr_samples": 0, "length_penalty": 0.0}, {"mbr_samples": 0, "length_penalty": 0.0}),
        ({"beam_size": 1}, {"beam_size": 1, "num_captions": 1, "mbr_samples": 0}),
        ({"beam_size": 1, "mbr_samples": 3}, {"beam_size": 1, "num_captions": 1, "mbr_samples": 3}),
        ({"beam_size": 3}, {"beam_size": 3}),
        ({"num_captions": 6}, {"beam_size": 6, "num_captions": 6}),
        ({"num_captions": 1}, {"num_captions": 1}),
        ({"beam_size": 9, "num_captions": 8}, {"beam_size": 9, "num_captions": 8}),
    ],
)
def test_what_is_asked_for_goes_over_the_models_own_search(
    asked: dict[str, int], changed: dict[str, int]
) -> None:
    assert DecodeOverrides(**asked).over(OWN) == OWN.model_copy(update=changed)


def test_every_setting_of_a_search_can_be_asked_for_within_the_same_limits() -> None:
    assert DecodeOverrides.model_fields.keys() == DecodeConfig.model_fields.keys()
    asked = DecodeOverrides.model_json_schema()["properties"]
    for name, own in DecodeConfig.model_json_schema()["properties"].items():
        limits = {key: own[key] for key in own.keys() - {"title", "description", "default"}}
        assert asked[name]["anyOf"] == [limits, {"type": "null"}]
        assert asked[name]["description"] == own["description"]
        assert asked[name]["default"] is None


def test_more_captions_than_beams_are_refused_at_once() -> None:
    with pytest.raises(ValidationError, match="num_captions: 5 must be at most beam_size 3"):
        DecodeOverrides(beam_size=3, num_captions=5)


def test_every_job_that_publishes_can_restart() -> None:
    publishing = [
        value
        for value in vars(config).values()
        if isinstance(value, type) and "output" in getattr(value, "model_fields", {})
    ]
    assert len(publishing) >= 7
    assert [value for value in publishing if "restart" not in value.model_fields] == []


@pytest.mark.parametrize("job", JOBS)
def test_how_a_run_is_shown_is_no_part_of_what_it_makes(job: str) -> None:
    assert "verbose" in JOBS[job].model_fields
    made = JOBS[job].model_construct(verbose=True)
    assert made.verbose
    assert "verbose" not in made.model_dump()
