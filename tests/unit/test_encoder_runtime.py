"""How an encoder's network runs on a CPU: what is chosen, and that it changes nothing."""

import shutil
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.nn import functional

from captioner.artifacts.manifests import EncoderRecord
from captioner.encoders import runtime
from captioner.encoders.encoder import CPU_IMAGES, Encoder
from captioner.features import runtime as pool_runtime
from captioner.runtime.cluster import PoolPlan
from tests.stores import encoder_spec

MANY = 10**9


class Network(nn.Module):
    """Of one convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 3, 2)

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cells = torch.relu(self.convolution(pixels))
        return cells.mean((2, 3)), cells


@pytest.fixture
def encoder() -> Encoder:
    torch.manual_seed(0)
    network = Network().eval().to(memory_format=torch.channels_last)
    spec = SimpleNamespace(input_size=(16, 16))
    made = SimpleNamespace(
        network=network, spec=spec, dtype=torch.float32, device=torch.device("cpu")
    )
    return cast(Encoder, made)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_a_compiled_network_gives_what_it_gave_of_any_number_of_images(
    encoder: Encoder, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    eager = encoder.network
    assert runtime.compile_encoder(encoder) is None
    assert encoder.network is not eager
    with torch.inference_mode():
        for count in (1, 3, CPU_IMAGES):
            pixels = torch.randn(count, 16, 16, 3).permute(0, 3, 1, 2)
            for wanted, found in zip(eager(pixels), encoder.network(pixels), strict=True):
                assert found.shape == wanted.shape
                alike = functional.cosine_similarity(wanted.flatten(1), found.flatten(1))
                assert alike.min() > 0.9999


def test_without_a_compiler_it_stays_as_it_is_and_the_reason_is_given(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(runtime, "WORTH_SECONDS", 0.0)
    eager = encoder.network
    assert runtime.choose_runtime(encoder, MANY) == ("eager", "there is no C++ compiler (g++)")
    assert encoder.network is eager


def test_nothing_is_compiled_for_a_few_images(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "compile_encoder", lambda _: pytest.fail("compiled"))
    assert runtime.choose_runtime(encoder, 100) == ("eager", None)


@pytest.mark.parametrize(("rate", "chosen"), [(109.0, "eager"), (111.0, "compiled")])
def test_the_compiled_network_must_win_by_a_tenth(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch, rate: float, chosen: str
) -> None:
    monkeypatch.setattr(runtime, "compile_encoder", lambda _: None)
    known = {"eager": 100.0, "compiled": rate}
    monkeypatch.setattr(
        runtime, "rates", lambda found, _pixels: {name: known[name] for name in found}
    )
    assert runtime.choose_runtime(encoder, MANY) == (chosen, None)


@pytest.mark.parametrize(
    ("images", "pool"),
    [(2000, PoolPlan(2, num_gpus=0, threads=1)), (MANY, PoolPlan(2, num_gpus=1, threads=1))],
)
def test_nothing_is_measured_on_gpus_nor_for_a_few_images(
    images: int, pool: PoolPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.remote", lambda **_: pytest.fail("measured"))
    chosen = pool_runtime.choose_runtime("no/such.file", encoder_spec(), images, pool, 0.0)
    assert chosen == "eager"


def test_features_may_be_mixed_whatever_the_runtime() -> None:
    eager, compiled = (
        EncoderRecord(spec=encoder_spec(), weights="random", runtime=name)
        for name in ("eager", "compiled")
    )
    assert eager.spec == compiled.spec
    assert "runtime" not in eager.spec.model_dump()
