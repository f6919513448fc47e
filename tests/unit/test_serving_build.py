"""What the application asks of Ray Serve: scaling, bounds, room for a second version."""

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from ray.serve.deployment import deployment_to_schema

from captioner.config import DecodeConfig, DecodeOverrides, ServeConfig
from captioner.errors import ConfigError, ModelError
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
    assert model.max_surge_percent == 100
    # They refuse by themselves what is too much; what Ray Serve held back would wait without a clock, health too.
    api = deployment_to_schema(build.api_deployment(config))
    assert min(model.max_ongoing_requests, api.max_ongoing_requests) > 10_000


@pytest.mark.parametrize("gpus", [0, 1, 2, 3, 8])
@pytest.mark.parametrize("cpus", [1, 2, 16])
@pytest.mark.parametrize("models", [1, 2, 5])
@pytest.mark.parametrize("replicas", [1, 3, 20])
def test_two_versions_of_every_model_fit_the_cluster(
    monkeypatch: Any, gpus: int, cpus: int, models: int, replicas: int
) -> None:
    monkeypatch.setattr(build, "num_gpus", lambda: gpus)
    monkeypatch.setattr(build, "num_cpus", lambda: cpus)
    config = ServeConfig(model=tuple(f"m{one}" for one in range(models)), max_replicas=replicas)
    options = build.model_deployment(config).ray_actor_options or {}
    most = 2 * models * replicas
    assert 0 < options["num_cpus"] <= 1
    assert int(1 / options["num_cpus"] + 1e-9) * cpus >= most
    assert (options["num_gpus"] > 0) == (gpus > 0)
    if gpus:
        assert options["num_gpus"] <= 0.5
        # None lies across two GPUs.
        assert int(1 / options["num_gpus"] + 1e-9) * gpus >= most


def test_what_a_replica_is_to_take_can_be_named(monkeypatch: Any) -> None:
    monkeypatch.setattr(build, "num_gpus", lambda: 0)  # the GPU's node comes later
    monkeypatch.setattr(build, "num_cpus", lambda: 0)
    config = ServeConfig(model=("a", "b"), gpus_per_replica=0.25)
    options = build.model_deployment(config).ray_actor_options or {}
    assert (options["num_cpus"], options["num_gpus"]) == (0.001, 0.25)


def test_models_are_called_what_people_call_them_and_deployments_what_ray_can_take() -> None:
    paths = {
        "modèle ü": "/tmp/odd dir/modèle ü",
        "a#b?c%d'\"e f": "s3://models/a#b?c%d'\"e f/",
        "x y": "file:///data/x%20y",
        "lr=0.1": "runs/lr=0.1",
        "best": "best=s3://bucket/lr=0.1/model",
        "équipe/a b": "équipe/a b=/data/model",
        "m": "/data/a=/b/m",
    }
    config = ServeConfig(model=tuple(paths.values()))
    assert list(config.models) == list(paths)
    assert config.models["équipe/a b"] == "/data/model"
    names = [build.deployment_name(name) for name in [*paths, "modèle u", 300 * "x"]]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"model-[A-Za-z0-9_.-]{1,50}", name) for name in names)
    assert names[4] == "model-best"


def test_cards_say_what_a_model_can(model: str) -> None:
    cards = build.describe_models(ServeConfig(model=(f"a={model}", f"b={model}")))
    assert [(card.name, card.attention, card.default) for card in cards.values()] == [
        ("a", True, True),
        ("b", True, False),
    ]


def test_each_model_may_have_its_search(model: str) -> None:
    config = ServeConfig(
        model=(f"a={model}", f"a.b={model}", f"c={model}"),
        decode=DecodeOverrides(beam_size=4, max_length=9),
        decode_of=("a.beam-size=2", "a.b.prefix=two red", "a.b.num_captions=3", "c.max-length=5"),
    )
    found = {name: card.decode for name, card in build.describe_models(config).items()}
    usual = DecodeConfig(beam_size=4, max_length=9)
    assert found == {
        "a": usual.model_copy(update={"beam_size": 2}),
        "a.b": usual.model_copy(update={"prefix": "two red", "num_captions": 3}),
        "c": usual.model_copy(update={"max_length": 5}),
    }
    for wrong, message in (
        ("d.beam-size=2", "not MODEL.SETTING=VALUE of one of a, a.b, c"),
        ("a.beams=2", "a.beams: Extra inputs are not permitted"),
        ("c.beam-size=x", "c.beam_size: Input should be a valid integer"),
        ("c.beam-size", "not MODEL.SETTING=VALUE"),
    ):
        with pytest.raises(ValidationError, match=re.escape(message)):
            ServeConfig(model=config.model, decode_of=(wrong,))
    unknown = ServeConfig(model=(f"a={model}",), decode_of=("a.prefix=a unicorn",))
    with pytest.raises(ConfigError, match="'a' is no word that the model knows"):
        build.describe_models(unknown)


def test_unusable_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not a model directory"):
        build.describe_models(ServeConfig(model=(str(tmp_path),)))
