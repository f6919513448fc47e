"""Any backbone of timm that gives a pooled vector and a feature map: ``timm:NAME[.TAG]``.

pooled is ``forward_head(pre_logits=True)``, what its classifier would see; the map is ``forward_intermediates``' last,
normalised, without class and register tokens. Input size, resize rule, mean and deviation are the model's own.
"""

import functools
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from captioner.config import Compute, EncoderConfig
from captioner.encoders.family import Family
from captioner.encoders.spec import EncoderSpec
from captioner.encoders.weights import (
    Tensors,
    digest,
    file_of_weights,
    random_weights,
    take_weights,
)
from captioner.errors import ConfigError, ModelError


class _Backbone(nn.Module):
    """A timm model as the pair of its pooled vector and its feature map."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        final, maps = self.model.forward_intermediates(
            pixels, indices=1, norm=True, output_fmt="NCHW"
        )
        return self.model.forward_head(final, pre_logits=True), maps[-1]


class Timm(Family):
    """All of timm."""

    family = "timm"

    def weights(self, config: EncoderConfig) -> tuple[Tensors, str]:
        if config.layer is not None:
            raise ConfigError("encoder.layer: timm's networks are run to their end")
        name, published = _name(config), config.weights == "pretrained"
        # First without weights: what cannot be used is not downloaded.
        _look(name, config.input_size)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            network = _create(name, config.input_size, pretrained=published)
        if published:
            return random_weights(network), name
        if config.weights == "random":
            return random_weights(network), f"random(seed={config.seed})"
        found = file_of_weights(config.weights, "pretrained, random")
        # A file has timm's own names, which are those behind "model." here.
        named = {f"model.{key}": tensor for key, tensor in found.items()}
        return take_weights(network, named, config.weights), os.path.basename(config.weights)

    def spec(self, config: EncoderConfig, tensors: Tensors, precision: Compute) -> EncoderSpec:
        name = _name(config)
        look = _look(name, config.input_size)
        data = look.data
        if data["crop_mode"] not in ("center", "squash"):
            raise ConfigError(
                f"encoder.name: {name} pads pictures ({data['crop_mode']}): not supported"
            )
        whole = data["crop_mode"] == "squash"
        return EncoderSpec(
            family=self.family,
            name=name,
            layer="final",
            input_size=look.input_size,
            resize="squash" if whole else "crop",
            crop_fraction=1.0 if whole else data["crop_pct"],
            filter=data["interpolation"],
            mean=tuple(255 * value for value in data["mean"]),
            deviation=tuple(255 * value for value in data["std"]),
            pooled_channels=look.pooled[1],
            grid_channels=look.cells[1],
            grid=(look.cells[2], look.cells[3]),
            precision=precision,
            weights_sha256=digest(tensors),
        )

    def build(self, spec: EncoderSpec) -> nn.Module:
        return _create(spec.name, spec.input_size[0])


FAMILY = Timm()


def _name(config: EncoderConfig) -> str:
    return config.name.partition(":")[2]


def _create(name: str, side: int | None, *, pretrained: bool = False) -> _Backbone:
    """The network, made for square inputs of ``side`` pixels where it must know that."""
    import timm

    sizes: list[dict[str, Any]] = [{}] if side is None else [{"img_size": side}, {}]
    for number, size in enumerate(sizes, 1):
        try:
            model = timm.create_model(name, pretrained=pretrained, num_classes=0, **size)
            return _Backbone(model.eval())
        except TypeError as error:
            if number == len(sizes):  # else a convolutional network, which takes any size
                raise ConfigError(f"encoder.name: timm cannot make {name}: {error}") from error
        except (OSError, RuntimeError, ValueError, KeyError, AssertionError) as error:
            reason = " ".join(str(error).split())[:200]
            if pretrained:
                raise ModelError(
                    f"encoder.weights: those of {name} cannot be had ({reason}): fetch them where there is a network, "
                    "or give a file or random"
                ) from error
            raise ConfigError(f"encoder.name: timm cannot make {name!r}: {reason}") from error
    raise AssertionError("unreachable: there is always a last size")


@dataclass(frozen=True)
class _Look:
    """What is known of a network without its weights."""

    data: dict[str, Any]
    """What timm says of the pictures that it wants."""
    input_size: tuple[int, int]
    pooled: tuple[int, ...]
    """Shape for one picture: [1, C]."""
    cells: tuple[int, ...]
    """Shape for one picture: [1, D, H, W]."""


@functools.cache
@torch.inference_mode()
def _look(name: str, side: int | None) -> _Look:
    """Look at a network, made for square inputs of ``side`` pixels or as timm has it.

    Raises:
        ConfigError: it does not give a pooled vector and a feature map.
    """
    import timm.data

    with torch.random.fork_rng(devices=[]):
        network = _create(name, side)
    data: dict[str, Any] = timm.data.resolve_model_data_config(network.model)  # type: ignore[no-untyped-call,attr-defined]
    _, rows, columns = data["input_size"] if side is None else (3, side, side)
    try:
        pooled, cells = network(torch.zeros(1, 3, rows, columns))
    except (AttributeError, TypeError, ValueError, RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"encoder.name: timm's {name} does not give both a pooled vector and a feature map ({reason})"
        ) from error
    if pooled.ndim != 2 or cells.ndim != 4:
        raise ConfigError(
            f"encoder.name: timm's {name} does not give a pooled vector and a feature map but {tuple(pooled.shape)} "
            f"and {tuple(cells.shape)}"
        )
    return _Look(data, (rows, columns), tuple(pooled.shape), tuple(cells.shape))
