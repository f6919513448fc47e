"""Any backbone of timm that gives a pooled vector and a feature map: ``timm:NAME[.TAG]``.

pooled is ``forward_head(pre_logits=True)``, what its classifier would see; the map is ``forward_intermediates``' last,
normalised, without class and register tokens. Input size, resize rule, mean and deviation are the model's own.
"""

import contextlib
import os
import re
from dataclasses import dataclass
from functools import cache
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

# In the names of a block's parameters, its number: blocks.11.norm1, layer4.1.conv1, s4.b7.conv1.
_OF_BLOCK = re.compile(r"\.b?\d+\.")


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
        # First without weights: what cannot be used is not downloaded.
        found = _inspect(_name(config), config.input_size)
        if config.weights == "pretrained":
            network = _create(found.name, found.input_size, pretrained=True)
            return random_weights(network), found.name
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            network = _create(found.name, found.input_size)
        if config.weights == "random":
            return random_weights(network), f"random(seed={config.seed})"
        tensors = file_of_weights(config.weights, "pretrained, random")
        # A file has timm's own names, which are those behind "model." here.
        named = {f"model.{key}": tensor for key, tensor in tensors.items()}
        return take_weights(network, named, config.weights), os.path.basename(config.weights)

    def spec(self, config: EncoderConfig, tensors: Tensors, precision: Compute) -> EncoderSpec:
        found = _inspect(_name(config), config.input_size)
        data = found.data
        return EncoderSpec(
            family=self.family,
            name=found.name,
            layer="final",
            input_size=found.input_size,
            resize="squash" if data["crop_mode"] == "squash" else "crop",
            crop_fraction=data["crop_pct"],
            filter=data["interpolation"],
            mean=tuple(255 * value for value in data["mean"]),
            deviation=tuple(255 * value for value in data["std"]),
            pooled_channels=found.pooled[1],
            grid_channels=found.cells[1],
            grid=(found.cells[2], found.cells[3]),
            precision=precision,
            weights_sha256=digest(tensors),
        )

    def stages(self, network: nn.Module) -> list[list[nn.Parameter]]:
        """Blocks; what comes behind the last one belongs to it."""
        from timm.models import group_parameters

        model: Any = network.model
        parameters = dict(model.named_parameters())
        found: list[list[nn.Parameter]] = []
        for _, names in sorted(group_parameters(model, model.group_matcher(coarse=False)).items()):
            own = [parameters[name] for name in names]
            if found and not any(_OF_BLOCK.search(name) for name in names):
                found[-1] += own
            else:
                found.append(own)
        return found

    def build(self, spec: EncoderSpec) -> nn.Module:
        return _create(spec.name, spec.input_size)


FAMILY = Timm()


@dataclass(frozen=True)
class _Inspected:
    """What there is to know of a model without its weights."""

    name: str
    """With the tag that timm takes where none is given: it decides the data's configuration, too."""
    input_size: tuple[int, int]
    data: dict[str, Any]
    """What timm says of the pictures that the model wants."""
    pooled: tuple[int, ...]
    """[1, C]."""
    cells: tuple[int, ...]
    """[1, D, H, W]."""


def _name(config: EncoderConfig) -> str:
    name = config.name.partition(":")[2]
    if ":" in name or "/" in name:
        # timm would fetch or read code's settings there, whenever the network is built.
        raise ConfigError(f"encoder.name: {name!r} is not the name of a model that timm has itself")
    return name


@cache
@torch.inference_mode()
def _inspect(name: str, side: int | None) -> _Inspected:
    """
    Raises:
        ConfigError: the model cannot be used.
    """
    network = _create(name, None if side is None else (side, side))
    model = network.model
    data = _data(model)
    if data["crop_mode"] not in ("center", "squash"):
        raise ConfigError(
            f"encoder.name: {name} pads pictures ({data['crop_mode']}): not supported"
        )
    _, rows, columns = data["input_size"]
    size = (rows, columns) if side is None else (side, side)
    try:
        pooled, cells = network(torch.zeros(1, 3, *size))
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
    tag = model.pretrained_cfg.get("tag")
    whole = f"{name.partition('.')[0]}.{tag}" if tag else name
    return _Inspected(whole, size, data, tuple(pooled.shape), tuple(cells.shape))


def _data(model: Any) -> dict[str, Any]:
    """What timm says of the pictures that a model wants."""
    import timm.data

    found: dict[str, Any] = timm.data.resolve_model_data_config(model)  # type: ignore[no-untyped-call,attr-defined]
    return found


def _create(name: str, size: tuple[int, int] | None, *, pretrained: bool = False) -> _Backbone:
    """The network, made for inputs of ``size`` where it must know that."""
    import timm

    try:
        model = timm.create_model(name, pretrained=pretrained, num_classes=0)
        if size is not None and size != tuple(_data(model)["input_size"][1:]):
            # A convolutional network, which takes any size, does not take this.
            with contextlib.suppress(TypeError):
                model = timm.create_model(name, pretrained=pretrained, num_classes=0, img_size=size)
        return _Backbone(model.eval())
    except (OSError, RuntimeError, ValueError, KeyError, AssertionError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        if pretrained:
            raise ModelError(
                f"encoder.weights: those of {name} cannot be had ({reason}): fetch them where there is a network, "
                "or give a file or random"
            ) from error
        raise ConfigError(f"encoder.name: timm cannot make {name!r}: {reason}") from error
