"""The frozen ResNet50: uint8 images -> one pooled vector and, if asked for, a 7x7 grid of vectors.

He et al., "Deep Residual Learning for Image Recognition" (2015). ``resnet50`` is torchvision's variant (a stage's
stride on its first 3x3 convolution), ``resnet50_v1`` the original (stride on the first 1x1), which is what Keras ships.

Shapes: B batch, C channels, P grid cells (49, row-major).
"""

import hashlib
import os
from collections import OrderedDict
from pickle import (
    UnpicklingError,  # what torch.load(weights_only=True) raises on anything but tensors
)
from typing import TYPE_CHECKING, Any
from urllib.error import URLError

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from captioner import storage
from captioner.artifacts.schema import GRID_CELLS, GRID_SIDE, EncoderIdentity
from captioner.config import Compute, EncoderConfig
from captioner.errors import ModelError

if TYPE_CHECKING:
    # Importing torchvision takes five seconds, for it imports torch's compiler: only where a network is built.
    from torchvision.models import ResNet50_Weights

IMAGE_SIDE = 224
CHANNELS = {"layer3": 1024, "layer4": 2048}
PREPROCESSING = {
    # name in the identity, subtracted from RGB 0..255, then divided by
    "resnet50": ("rgb-imagenet-mean-std", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
    "resnet50_v1": ("rgb-caffe-mean", (123.68, 116.779, 103.939), (1.0, 1.0, 1.0)),
}
_STAGES = ("layer1", "layer2", "layer3", "layer4")

Tensors = dict[str, Tensor]


def build_network(name: str, layer: str) -> nn.Sequential:
    """The stages from conv1 to ``layer``, ending in its ReLU; torchvision's parameter names."""
    from torchvision.models import resnet50

    full = resnet50()
    if name == "resnet50_v1":
        for stage in _STAGES[1:]:
            first: Any = getattr(full, stage)[0]
            first.conv1.stride, first.conv2.stride = (2, 2), (1, 1)
    parts = ("conv1", "bn1", "relu", "maxpool", *_STAGES[: _STAGES.index(layer) + 1])
    return nn.Sequential(OrderedDict((part, getattr(full, part)) for part in parts)).eval()


def load_weights(config: EncoderConfig) -> Tensors:
    """The float32 tensors of the network of ``config``: from torchvision, a file, or a seed.

    Raises:
        ModelError: the weights cannot be had, or do not fit the network.
    """
    from torchvision.models import ResNet50_Weights

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = build_network(config.name, config.layer)
    wanted = network.state_dict()
    if config.weights == "random":
        return {name: tensor.clone() for name, tensor in wanted.items() if tensor.ndim}
    if config.weights in ResNet50_Weights.__members__:
        if config.name != "resnet50":
            raise ModelError(
                f"encoder.weights: {config.weights} are torchvision's and belong to encoder.name "
                f"resnet50, not {config.name}; give a file"
            )
        found = _download(ResNet50_Weights[config.weights])
    else:
        found = _read(config.weights)
    chosen = {}
    for name, tensor in wanted.items():
        if tensor.ndim == 0:  # num_batches_tracked: unused in inference, absent from many files
            continue
        if name not in found:
            raise ModelError(
                f"encoder.weights: {config.weights} has no {name!r}, needed up to {config.layer}"
            )
        if found[name].shape != tensor.shape:
            raise ModelError(
                f"encoder.weights: {config.weights} holds {name!r} as {tuple(found[name].shape)}, "
                f"the network wants {tuple(tensor.shape)}"
            )
        chosen[name] = found[name].to(torch.float32).contiguous()
    return chosen


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


def _read(uri: str) -> Tensors:
    if not storage.exists(uri):
        raise ModelError(
            f"encoder.weights: {uri!r} is neither IMAGENET1K_V2, IMAGENET1K_V1 or random, nor a file"
        )
    try:
        if uri.endswith(".safetensors"):
            return dict(safetensors.torch.load(storage.read_bytes(uri)))
        if uri.endswith((".pth", ".pt")):
            with storage.open_input(uri) as file:
                loaded = torch.load(file, map_location="cpu", weights_only=True)
            if isinstance(loaded, dict) and all(isinstance(v, Tensor) for v in loaded.values()):
                return dict(loaded)
            raise ModelError(f"encoder.weights: {uri} is not a plain state_dict")
    except (safetensors.SafetensorError, RuntimeError, EOFError, ValueError) as error:
        raise ModelError(f"encoder.weights: {uri} cannot be read: {error}") from error
    except UnpicklingError as error:
        raise ModelError(f"encoder.weights: {uri} is not a plain state_dict") from error
    raise ModelError(f"encoder.weights: {uri} must end in .safetensors, .pth or .pt")


def identify(config: EncoderConfig, tensors: Tensors, compute: Compute) -> EncoderIdentity:
    """What decides the value of an embedding made with these settings and tensors."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].numpy().tobytes())
    weights = config.weights.rstrip("/").rpartition("/")[2]
    return EncoderIdentity(
        name=config.name,
        layer=config.layer,
        weights=f"random(seed={config.seed})" if weights == "random" else weights,
        weights_sha256=digest.hexdigest(),
        preprocessing=PREPROCESSING[config.name][0],
        compute=compute,
        channels=CHANNELS[config.layer],
    )


# Images per forward pass on a CPU: 45 images/s and core against 31 for 32 of them. The largest activation is then below
# 32 MiB, above which glibc fetches memory from the system, page by page, for every operation, and more stays in cache.
_CPU_IMAGES = 8


class Encoder:
    """The network on a device, ready to encode.

    Batch norms are folded into the convolutions in float32 before the change of dtype, which is both faster and
    closer to the float32 result; memory is channels-last, which the bfloat16 kernels of CPUs and GPUs want.
    """

    def __init__(self, identity: EncoderIdentity, tensors: Tensors, device: str = "cpu"):
        self.identity = identity
        self.device = torch.device(device)
        self.dtype = getattr(torch, identity.compute)
        network = build_network(identity.name, identity.layer)
        missing = network.load_state_dict(tensors, strict=False)
        left = [name for name in missing.missing_keys if not name.endswith("num_batches_tracked")]
        if left or missing.unexpected_keys:
            raise ModelError(
                f"encoder weights do not fit {identity.name}: {left or missing.unexpected_keys}"
            )
        _fold_batch_norms(network)
        network = network.to(self.device, self.dtype)
        self.network = network.to(memory_format=torch.channels_last)
        _, mean, scale = PREPROCESSING[identity.name]
        self.mean = torch.tensor(mean, device=self.device)
        self.scale = torch.tensor(scale, device=self.device)

    @classmethod
    def load(cls, uri: str, identity: EncoderIdentity, device: str = "cpu") -> "Encoder":
        """From ``encoder.safetensors`` of a store or a model.

        Raises:
            ModelError: the file is not the one of ``identity``.
        """
        return cls(identity, _read(uri), device)

    @torch.inference_mode()
    def __call__(
        self, images: np.ndarray[Any, np.dtype[np.uint8]], *, grid: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Encode a batch.

        Args:
            images: uint8 RGB [B, 224, 224, 3], B at least 1.

        Returns:
            pooled float32 [B, C] and, with ``grid``, float16 [B, P, C], on the encoder's device.
        """
        size = _CPU_IMAGES if self.device.type == "cpu" else max(1, len(images))
        parts = [
            self._encode(images[start : start + size], grid)
            for start in range(0, len(images), size)
        ]
        pooled = torch.cat([part for part, _ in parts])
        return pooled, torch.cat(
            [cells for _, cells in parts if cells is not None]
        ) if grid else None

    def _encode(
        self, images: np.ndarray[Any, np.dtype[np.uint8]], grid: bool
    ) -> tuple[Tensor, Tensor | None]:
        # NHWC seen as NCHW is exactly the channels-last layout: no copy.
        if not images.flags.writeable:
            images = (
                images.copy()
            )  # shared memory of Ray's object store, which torch would warn about
        pixels = torch.from_numpy(images).to(self.device, non_blocking=True)
        pixels = ((pixels.float() - self.mean) / self.scale).to(self.dtype)
        feature_map = self.network(pixels.permute(0, 3, 1, 2))  # (B, C, 7, 7) or (B, C, 14, 14)
        pooled = feature_map.float().mean(dim=(2, 3))
        if not grid:
            return pooled, None
        if feature_map.shape[-1] != GRID_SIDE:
            feature_map = nn.functional.avg_pool2d(
                feature_map.float(), feature_map.shape[-1] // GRID_SIDE
            )
        cells = feature_map.flatten(2).transpose(1, 2)
        return pooled, cells.reshape(len(images), GRID_CELLS, -1).to(torch.float16).contiguous()


def _fold_batch_norms(network: nn.Sequential) -> None:
    def fold(owner: nn.Module, convolution: str, norm: str) -> None:
        fused = fuse_conv_bn_eval(getattr(owner, convolution), getattr(owner, norm))
        setattr(owner, convolution, fused)
        setattr(owner, norm, nn.Identity())

    from torchvision.models.resnet import Bottleneck

    fold(network, "conv1", "bn1")
    for module in network.modules():
        if isinstance(module, Bottleneck):
            for number in "123":
                fold(module, f"conv{number}", f"bn{number}")
            if module.downsample is not None:
                fold(module.downsample, "0", "1")
