"""ResNet50, up to its third or its last stage.

He et al., "Deep Residual Learning for Image Recognition" (2015). ``resnet50`` is torchvision's variant (a stage's
stride on its first 3x3 convolution), ``resnet50_v1`` the original (stride on the first 1x1), which is what Keras ships.

Shapes: B batch, C channels, H and W rows and columns of the grid.
"""

import os
from collections import OrderedDict
from typing import TYPE_CHECKING, Any
from urllib.error import URLError

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

if TYPE_CHECKING:
    # Importing torchvision takes five seconds, for it imports torch's compiler: only where a network is built.
    from torchvision.models import ResNet50_Weights

_STAGES = ("layer1", "layer2", "layer3", "layer4")
_CHANNELS = {"layer3": 1024, "layer4": 2048}
# Subtracted from R, G, B in 0..255, then divided by.
_STATISTICS = {
    "resnet50": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
    "resnet50_v1": ((123.68, 116.779, 103.939), (1.0, 1.0, 1.0)),
}
_SIDE = 224
# Pixels of one cell of the grid: layer3, with twice as many rows and columns, is averaged to those of layer4.
_CELL = 32


class _ResNet50(nn.Sequential):
    """The stages from conv1 to ``layer``, ending in its ReLU; torchvision's parameter names."""

    def __init__(self, name: str, layer: str):
        from torchvision.models import resnet50

        full = resnet50()
        if name == "resnet50_v1":
            for stage in _STAGES[1:]:
                first: Any = getattr(full, stage)[0]
                first.conv1.stride, first.conv2.stride = (2, 2), (1, 1)
        parts = ("conv1", "bn1", "relu", "maxpool", *_STAGES[: _STAGES.index(layer) + 1])
        super().__init__(OrderedDict((part, getattr(full, part)) for part in parts))
        self.averaged = layer == "layer3"

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
        feature_map: Tensor = super().forward(input).float()  # type: ignore[no-untyped-call]
        pooled = feature_map.mean(dim=(2, 3))
        return pooled, nn.functional.avg_pool2d(feature_map, 2) if self.averaged else feature_map


class ResNet50(Family):
    """The family of both variants."""

    family, names = "resnet50", ("resnet50", "resnet50_v1")

    def weights(self, config: EncoderConfig) -> tuple[Tensors, str]:
        from torchvision.models import ResNet50_Weights

        if (config.input_size or _SIDE) % _CELL:
            raise ConfigError(f"encoder.input-size: {config.input_size} is no multiple of {_CELL}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            network = _ResNet50(config.name, config.layer or "layer4")
        if config.weights == "random":
            return random_weights(network), f"random(seed={config.seed})"
        published = tuple(ResNet50_Weights.__members__)
        if config.weights == "pretrained" or config.weights in published:
            if config.name != "resnet50":
                raise ModelError(
                    f"encoder.weights: {config.weights} are torchvision's and belong to encoder.name resnet50, not "
                    f"{config.name}; give a file"
                )
            name = published[-1] if config.weights == "pretrained" else config.weights
            return take_weights(network, _download(ResNet50_Weights[name]), name), name
        found = file_of_weights(config.weights, f"pretrained, {', '.join(published)} or random")
        return take_weights(network, found, config.weights), os.path.basename(config.weights)

    def spec(self, config: EncoderConfig, tensors: Tensors, precision: Compute) -> EncoderSpec:
        layer, side = config.layer or "layer4", config.input_size or _SIDE
        mean, deviation = _STATISTICS[config.name]
        return EncoderSpec(
            family=self.family,
            name=config.name,
            layer=layer,
            input_size=(side, side),
            # As the notebook's features were made, and all of the picture that a caption may speak of.
            resize="squash",
            filter="bilinear",
            mean=mean,
            deviation=deviation,
            pooled_channels=_CHANNELS[layer],
            grid_channels=_CHANNELS[layer],
            grid=(side // _CELL, side // _CELL),
            precision=precision,
            weights_sha256=digest(tensors),
        )

    def stages(self, network: nn.Module) -> list[list[nn.Parameter]]:
        return [
            list(part.parameters()) for name, part in network.named_children() if name in _STAGES
        ]

    def build(self, spec: EncoderSpec) -> nn.Module:
        return _ResNet50(spec.name, spec.layer)


FAMILY = ResNet50()


def _download(weights: "ResNet50_Weights") -> Tensors:
    try:
        tensors: Tensors = weights.get_state_dict(
            progress=False, check_hash=True, map_location="cpu", weights_only=True
        )
    except (URLError, OSError) as error:
        place = os.path.join(torch.hub.get_dir(), "checkpoints", weights.url.rpartition("/")[2])
        raise ModelError(
            f"encoder.weights: {weights.name} could not be downloaded ({error}); "
            f"place the file at {place}, or give a file or random"
        ) from error
    return tensors
