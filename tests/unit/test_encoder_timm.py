"""Backbones of timm: what they give, what decides it, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch

from captioner.config import EncoderConfig
from captioner.encoders.encoder import Encoder
from captioner.encoders.family import family_of
from captioner.encoders.spec import EncoderSpec
from captioner.encoders.weights import Tensors, digest
from captioner.errors import ConfigError, ModelError

NAMES = [
    "resnet18",
    "convnext_atto",
    "vit_tiny_patch16_224",
    "vit_base_patch32_clip_224",
    "mobilenetv3_small_050",  # whose pooled vector has more channels than its map
    "visformer_tiny",  # whose batch norms cannot be folded
    "dm_nfnet_f0",  # which has parameters without a dimension
]


def describe(name: str, **settings: object) -> tuple[EncoderSpec, Tensors]:
    config = EncoderConfig(name=f"timm:{name}", weights="random").model_copy(update=settings)
    family, _ = family_of(config.name)
    tensors, _ = family.weights(config)
    return family.spec(config, tensors, "float32"), tensors


@pytest.mark.parametrize("name", NAMES)
def test_features_are_timms_own(name: str) -> None:
    spec, tensors = describe(name)
    model = timm.create_model(name, num_classes=0).eval()
    for key in tensors:  # those that a fresh network would not have
        if not tensors[key].ndim:
            tensors[key] = torch.tensor(0.3)
    spec = spec.model_copy(update={"weights_sha256": digest(tensors)})
    model.load_state_dict(
        {key.removeprefix("model."): value for key, value in tensors.items()}, strict=False
    )
    data = timm.data.resolve_model_data_config(model)
    assert (3, *spec.input_size) == data["input_size"]
    assert spec.resize == ("squash" if data["crop_mode"] == "squash" else "crop")
    assert spec.crop_fraction == data["crop_pct"]
    images = np.random.default_rng(0).integers(0, 256, (2, *spec.input_size, 3), dtype=np.uint8)
    mean, deviation = torch.tensor(data["mean"]), torch.tensor(data["std"])
    pixels = ((torch.from_numpy(images) / 255 - mean) / deviation).permute(0, 3, 1, 2)
    with torch.inference_mode():
        final, (cells,) = model.forward_intermediates(pixels, indices=1, norm=True)
        expected = model.forward_head(final, pre_logits=True)
    pooled, grid = Encoder(spec, tensors)(images, grid=True)
    assert grid is not None
    assert (pooled.shape[1:], grid.shape[1:]) == (spec.shape.of("pooled"), spec.shape.of("grid"))
    assert torch.cosine_similarity(pooled, expected).min() > 0.9999
    wanted = cells.flatten(2).transpose(1, 2)
    assert torch.cosine_similarity(grid.float().flatten(1), wanted.flatten(1)).min() > 0.9999


def test_batch_norms_are_folded_where_they_can_be() -> None:
    left = {}
    for name in ("resnet18", "visformer_tiny"):
        network = Encoder(*describe(name)).network
        left[name] = sum(isinstance(part, torch.nn.BatchNorm2d) for part in network.modules())
    assert left["resnet18"] == 0
    assert left["visformer_tiny"] > 0


def test_a_network_is_made_twice_at_most_for_its_spec_and_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made, make = [], timm.create_model

    def counted(name: str, **options: object) -> torch.nn.Module:
        made.append(name)
        return make(name, **options)

    monkeypatch.setattr(timm, "create_model", counted)
    describe("resnet10t")
    assert len(made) == 2


def test_weights_from_a_file_are_the_weights(tmp_path: Path) -> None:
    model = timm.create_model("resnet18")  # with its classifier, as published files have it
    path = tmp_path / "resnet18.safetensors"
    safetensors.torch.save_file(model.state_dict(), path)
    spec, tensors = describe("resnet18", weights=str(path))
    torch.testing.assert_close(tensors["model.conv1.weight"], model.state_dict()["conv1.weight"])
    assert spec.weights_sha256 != describe("resnet18")[0].weights_sha256
    with pytest.raises(ModelError, match=r"has no 'model\.stem\.0\.weight'"):
        describe("convnext_atto", weights=str(path))


def test_another_input_size_is_another_grid() -> None:
    assert describe("resnet18", input_size=64)[0].grid == (2, 2)
    spec, tensors = describe("vit_tiny_patch16_224", input_size=64)
    assert spec.grid == (4, 4)
    pooled, _ = Encoder(spec, tensors)(np.zeros((1, 64, 64, 3), np.uint8), grid=False)
    assert pooled.shape == (1, 192)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("resnet999", {}, "timm cannot make 'resnet999'"),
        ("resnet18.nonsense", {}, "Invalid pretrained tag"),
        ("hiera_tiny_224", {}, "does not give both a pooled vector and a feature map"),
        ("resnet18", {"layer": "layer3"}, "run to their end"),
        ("hf-hub:someone/model", {}, "not the name of a model that timm has itself"),
        ("local-dir:models", {}, "not the name of a model that timm has itself"),
    ],
)
def test_what_cannot_be_used_is_one_line(
    name: str, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        describe(name, **settings)
    assert "\n" not in str(caught.value)


def test_weights_that_cannot_be_fetched_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="cannot be had") as caught:
        describe("resnet18", weights="pretrained")
    assert "\n" not in str(caught.value)


def test_a_name_and_its_default_tag_are_one_encoder() -> None:
    assert describe("resnet18")[0] == describe("resnet18.a1_in1k")[0]


def test_features_of_random_networks_stay_finite() -> None:
    spec, tensors = describe("mobileone_s0")
    images = np.random.default_rng(0).integers(0, 256, (1, *spec.input_size, 3), dtype=np.uint8)
    _, grid = Encoder(spec, tensors)(images, grid=True)
    assert grid is not None
    assert grid.isfinite().all()
