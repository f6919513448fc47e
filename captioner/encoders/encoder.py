"""An image network ready to encode: uint8 pixels -> one pooled vector and, if asked for, a grid of vectors.

Shapes: B batch, C and D channels, P grid cells (row-major).
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from captioner.encoders.family import family_called
from captioner.encoders.feed import Feed
from captioner.encoders.spec import EncoderSpec
from captioner.encoders.weights import Tensors, digest, is_bookkeeping, read_weights
from captioner.errors import ModelError

# Images per forward pass on a CPU: 45 images/s and core against 31 for 32 of them. The largest activation is then below
# 32 MiB, above which glibc fetches memory from the system, page by page, for every operation, and more stays in cache.
CPU_IMAGES = 8
# Folded and unfolded networks may differ by rounding.
_TOLERANCE = 1e-3
_LARGEST = torch.finfo(torch.float16).max


class Encoder:
    """The network of a spec on a device.

    Batch norms are folded into the convolutions before them, in float32, which is both faster and closer to the float32
    result; memory is channels-last, which the bfloat16 kernels of CPUs and GPUs want.
    """

    def __init__(self, spec: EncoderSpec, tensors: Tensors, device: str = "cpu"):
        """
        Raises:
            ModelError: the tensors are not those of the spec.
        """
        self.spec = spec
        self.device = torch.device(device)
        self.dtype = getattr(torch, spec.precision)
        network = _fold_batch_norms(build_network(spec, tensors), spec.input_size)
        self.network = channels_last(network.to(self.device, self.dtype))
        self.mean = torch.tensor(spec.mean, device=self.device)
        self.deviation = torch.tensor(spec.deviation, device=self.device)
        self._feed = Feed(self.device)

    @classmethod
    def load(cls, uri: str, spec: EncoderSpec, device: str = "cpu") -> "Encoder":
        """From ``encoder.safetensors`` of a store or a model.

        Raises:
            ModelError: the file is not the one of ``spec``.
        """
        try:
            return cls(spec, read_weights(uri), device)
        except ModelError as error:
            raise ModelError(f"{uri}: {error}") from error

    @torch.inference_mode()
    def __call__(
        self, images: np.ndarray[Any, np.dtype[np.uint8]] | Tensor, *, grid: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Encode a batch.

        Args:
            images: uint8 RGB [B, rows, columns, 3], B at least 1; a tensor is on the encoder's device.

        Returns:
            pooled float32 [B, C] and, with ``grid``, float16 [B, P, D], on the encoder's device.
        """
        pixels = images if isinstance(images, Tensor) else self._feed.put(images)
        size = CPU_IMAGES if self.device.type == "cpu" else len(pixels)
        parts = [self._encode(part) for part in torch.split(pixels, size)]
        pooled = torch.cat([part.float() for part, _ in parts])
        if not grid:
            return pooled, None
        cells = torch.cat([part.flatten(2).transpose(1, 2) for _, part in parts])
        # Beyond what float16 holds lie values of random networks alone.
        return pooled, cells.clamp(-_LARGEST, _LARGEST).to(torch.float16).contiguous()

    def _encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        # NHWC seen as NCHW is exactly the channels-last layout: no copy.
        values = ((pixels.float() - self.mean) / self.deviation).to(self.dtype)
        found: tuple[Tensor, Tensor] = self.network(values.permute(0, 3, 1, 2))
        return found


def build_network(spec: EncoderSpec, tensors: Tensors) -> nn.Module:
    """The network of a spec with its weights, float32, in evaluation mode.

    Raises:
        ModelError: the tensors are not those of the spec.
    """
    if digest(tensors) != spec.weights_sha256:
        raise ModelError(f"the weights are not those of {spec.family} {spec.name} in the spec")
    network = family_called(spec.family).build(spec)
    try:
        missing = network.load_state_dict(tensors, strict=False)
    except RuntimeError as error:  # of shapes
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"the weights do not fit {spec.name}: {reason}") from error
    left = [name for name in missing.missing_keys if not is_bookkeeping(name)]
    if left or missing.unexpected_keys:
        raise ModelError(f"the weights do not fit {spec.name}: {left or missing.unexpected_keys}")
    return network.eval()


def channels_last(network: nn.Module) -> nn.Module:
    """A network in the memory layout that convolutions want, where it has one."""
    if all(part.ndim < 5 for part in network.parameters()):
        return network.to(memory_format=torch.channels_last)
    return network


@torch.no_grad()
def _fold_batch_norms(network: nn.Module, input_size: tuple[int, int]) -> nn.Module:
    """The network with its batch norms folded, where torch.fx can follow it; else as it is."""
    from torch.fx.experimental.optimization import fuse
    from torch.fx.proxy import TraceError

    if not any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in network.modules()):
        return network
    try:
        folded = fuse(network)
        # A trace keeps what it met: of a network that decides by its input it is another network.
        generator = torch.Generator().manual_seed(0)
        for batch in (1, 2):
            pixels = torch.randn(batch, 3, *input_size, generator=generator)
            for wanted, found in zip(network(pixels), folded(pixels), strict=True):
                if not torch.allclose(wanted, found, atol=_TOLERANCE * float(wanted.abs().max())):
                    return network
    except torch.OutOfMemoryError:
        raise  # a RuntimeError, which says nothing about the network
    except (TraceError, TypeError, ValueError, RuntimeError, AttributeError):
        return network
    return folded
