"""The ResNet50s, and what every encoder does: batch independence, arithmetic, weights from files, one spec for all."""

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torchvision.models import resnet50

from captioner.config import Compute, EncoderConfig
from captioner.encoders.encoder import Encoder
from captioner.encoders.family import family_called, family_of
from captioner.encoders.spec import EncoderSpec
from captioner.encoders.weights import Tensors
from captioner.errors import ConfigError, ModelError

RANDOM = EncoderConfig(weights="random")


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (5, 224, 224, 3), dtype=np.uint8)


def load_weights(config: EncoderConfig) -> Tensors:
    tensors, _ = family_of(config.name)[0].weights(config)
    return tensors


def spec_of(config: EncoderConfig, tensors: Tensors, compute: Compute = "float32") -> EncoderSpec:
    return family_of(config.name)[0].spec(config, tensors, compute)


def make(config: EncoderConfig, compute: Compute) -> Encoder:
    tensors = load_weights(config)
    return Encoder(spec_of(config, tensors, compute), tensors)


def test_layer4_equals_torchvision_without_its_head(images: np.ndarray) -> None:
    reference = resnet50().eval()
    tensors = load_weights(RANDOM)
    reference.load_state_dict(tensors, strict=False)
    reference.fc = torch.nn.Identity()
    mean = torch.tensor([0.485, 0.456, 0.406])
    deviation = torch.tensor([0.229, 0.224, 0.225])
    pixels = (torch.from_numpy(images) / 255 - mean) / deviation
    with torch.inference_mode():
        expected = reference(pixels.permute(0, 3, 1, 2))
    pooled, grid = make(RANDOM, "float32")(images, grid=True)
    torch.testing.assert_close(pooled, expected, rtol=1e-3, atol=1e-4)
    assert grid is not None
    assert grid.shape == (5, 49, 2048)
    torch.testing.assert_close(grid.float().mean(dim=1), pooled, rtol=2e-2, atol=2e-3)


def test_v1_puts_the_stride_on_the_first_convolution() -> None:
    strides = {}
    for name in ("resnet50", "resnet50_v1"):
        config = EncoderConfig(name=name, weights="random")
        network = family_called("resnet50").build(spec_of(config, load_weights(config)))
        first = network.get_submodule("layer3.0")
        strides[name] = (first.conv1.stride, first.conv2.stride)  # type: ignore[union-attr]
    assert strides == {"resnet50": ((1, 1), (2, 2)), "resnet50_v1": ((2, 2), (1, 1))}


def test_full_network_has_the_notebooks_number_of_parameters() -> None:
    tensors = load_weights(EncoderConfig(name="resnet50_v1", weights="random"))
    # Keras counts the 26,560 convolution biases that batch norm makes redundant.
    assert sum(tensor.numel() for tensor in tensors.values()) + 26_560 == 23_587_712


def test_bfloat16_agrees_with_float32(images: np.ndarray) -> None:
    exact, _ = make(RANDOM, "float32")(images, grid=False)
    fast, _ = make(RANDOM, "bfloat16")(images, grid=False)
    assert torch.cosine_similarity(exact, fast).min() >= 0.999


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_embedding_does_not_depend_on_its_batch(images: np.ndarray, compute: str) -> None:
    encoder = make(EncoderConfig(weights="random", layer="layer3"), compute)
    together, grids = encoder(images, grid=True)
    alone, grid = encoder(images[3:4], grid=True)
    assert grids is not None
    assert grid is not None
    torch.testing.assert_close(alone[0], together[3], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grid[0], grids[3], rtol=1e-3, atol=1e-3)


def test_layer3_grid_is_averaged_to_seven_by_seven(images: np.ndarray) -> None:
    pooled, grid = make(EncoderConfig(weights="random", layer="layer3"), "float32")(
        images, grid=True
    )
    assert pooled.shape == (5, 1024)
    assert grid is not None
    assert grid.shape == (5, 49, 1024)


def test_seed_decides_random_weights_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    first = load_weights(RANDOM)["conv1.weight"]
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(first, load_weights(RANDOM)["conv1.weight"])
    other = load_weights(EncoderConfig(weights="random", seed=1))["conv1.weight"]
    assert not torch.equal(first, other)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_from_a_file_are_the_weights(tmp_path: Path, suffix: str) -> None:
    tensors = load_weights(RANDOM)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save(tensors, path)
    else:
        safetensors.torch.save_file(tensors, path)
    config = EncoderConfig(weights=str(path))
    loaded = load_weights(config)
    assert spec_of(config, loaded) == spec_of(RANDOM, tensors)


def test_weights_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    tensors = load_weights(EncoderConfig(weights="random", layer="layer3"))
    path = tmp_path / "to_layer3.safetensors"
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(ModelError, match=r"no 'layer4\.0\.conv1\.weight', which the network"):
        load_weights(EncoderConfig(weights=str(path)))
    with pytest.raises(ModelError, match="neither pretrained, IMAGENET1K_V1"):
        load_weights(EncoderConfig(weights=str(tmp_path / "absent.safetensors")))
    path.write_bytes(b"rubbish")
    with pytest.raises(ModelError, match="cannot be read"):
        load_weights(EncoderConfig(weights=str(path)))


class _Trap:
    def __reduce__(self) -> tuple[object, ...]:
        return (print, ("executed",))


def test_pickled_code_in_a_weights_file_is_never_executed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "trap.pth"
    torch.save(_Trap(), path)
    with pytest.raises(ModelError, match="not a plain state_dict"):
        load_weights(EncoderConfig(weights=str(path)))
    assert "executed" not in capsys.readouterr().out


def test_torchvision_weights_are_refused_for_the_other_network() -> None:
    with pytest.raises(ModelError, match="belong to encoder.name resnet50"):
        load_weights(EncoderConfig(name="resnet50_v1", weights="IMAGENET1K_V1"))


def test_missing_network_names_the_file_to_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(ModelError, match=r"place the file at .*checkpoints/resnet50-11ad3fa6\.pth"):
        load_weights(EncoderConfig())


def test_input_of_another_size_has_another_grid() -> None:
    config = EncoderConfig(weights="random", layer="layer3", input_size=96)
    encoder = make(config, "float32")
    pooled, grid = encoder(np.zeros((2, 96, 96, 3), np.uint8), grid=True)
    assert grid is not None
    assert encoder.spec.shape.of("grid") == grid.shape[1:] == (9, 1024)
    assert encoder.spec.shape.of("pooled") == pooled.shape[1:]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"name": "resnet51"},
            "encoder.name: 'resnet51' is not one of resnet50, resnet50_v1, timm:NAME",
        ),
        ({"name": "timm:"}, "encoder.name: 'timm:' is not one of"),
        ({"input_size": 100}, "encoder.input-size: 100 is no multiple of 32"),
    ],
)
def test_wrong_settings_are_one_line(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_weights(RANDOM.model_copy(update=change))


def test_weights_of_another_network_are_refused() -> None:
    tensors = load_weights(RANDOM)
    spec = spec_of(RANDOM, tensors)
    tensors["conv1.weight"][0, 0, 0, 0] += 1e-3
    with pytest.raises(ModelError, match="not those of resnet50"):
        Encoder(spec, tensors)


def test_memory_that_runs_out_is_no_reason_to_leave_batch_norms(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(network: torch.nn.Module) -> None:
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr("torch.fx.experimental.optimization.fuse", fail)
    with pytest.raises(torch.OutOfMemoryError):
        make(RANDOM, "float32")
