"""What the application asks of Ray Serve: scaling, bounds, room for a second version."""

from pathlib import Path
from typing import Any

import pytest
from ray.serve.deployment import deployment_to_schema

from captioner.config import ServeConfig
from captioner.errors import ModelError
from captioner.serving import build
from tests.models import write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("models") / "places", "spatial_attention")


def test_models_scale_with_ongoing_requests_between_their_bounds(monkeypatch: Any) -> None:
    monkeypatch.setattr(build, "num_gpus", lambda: 0)
    monkeypatch.setattr(build, "num_cpus", lambda: 2)
    config = ServeConfig(
        model=("a", "b"), min_replicas=2, max_replicas=5, max_batch_size=8, max_queued=9
    )
    model = deployment_to_schema(build.model_deployment(config))
    scaling = model.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (2, 5)
    assert scaling.target_ongoing_requests == 8
    # A batch cannot exceed the requests that a replica may hold.
    assert model.max_ongoing_requests >= 2 * 8
    assert model.max_queued_requests == 9
    assert model.max_surge_percent == 100
    assert deployment_to_schema(build.api_deployment(config)).max_ongoing_requests > 256


@pytest.mark.parametrize(
    ("gpus", "settings", "expected"),
    [
        (0, {}, {"num_cpus": 0.5, "num_gpus": 0}),
        (1, {}, {"num_cpus": 0.5, "num_gpus": 0.5}),
        (1, {"gpus_per_replica": 1, "cpus_per_replica": 4}, {"num_cpus": 4, "num_gpus": 1}),
    ],
)
def test_two_versions_of_every_model_fit_the_cluster(
    monkeypatch: Any, gpus: int, settings: dict[str, Any], expected: dict[str, float]
) -> None:
    monkeypatch.setattr(build, "num_gpus", lambda: gpus)
    monkeypatch.setattr(build, "num_cpus", lambda: 2)
    config = ServeConfig(model=("a", "b"), **settings)
    options = build.model_deployment(config).ray_actor_options
    assert options is not None
    assert {name: options.get(name, 0) for name in expected} == expected


def test_cards_say_what_a_model_can(model: str) -> None:
    cards = build.describe_models(ServeConfig(model=(f"a={model}", f"b={model}")))
    assert [(card.name, card.attention, card.default) for card in cards.values()] == [
        ("a", True, True),
        ("b", True, False),
    ]


def test_unusable_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not a model directory"):
        build.describe_models(ServeConfig(model=(str(tmp_path),)))
