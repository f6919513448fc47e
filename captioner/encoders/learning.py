"""An image network whose last stages learn: uint8 pixels -> features, with gradients.

Shapes: B batch, C and D channels, P grid cells (row-major).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from captioner.encoders.encoder import build_network, channels_last
from captioner.encoders.family import family_called
from captioner.encoders.spec import Column, EncoderSpec
from captioner.encoders.weights import Tensors, digest, random_weights
from captioner.errors import ConfigError


class LearningEncoder(nn.Module):
    """The network of a spec in float32. Its batch norms keep the statistics and factors that they have. It is always in
    evaluation mode: without dropout it is one function of its weights."""

    def __init__(self, spec: EncoderSpec, tensors: Tensors, columns: Sequence[Column], stages: int):
        """
        Args:
            columns: the features that are wanted.
            stages: how many of the last stages learn.

        Raises:
            ModelError: the tensors are not those of the spec.
            ConfigError: it has fewer stages, or none of their parameters learns.
        """
        super().__init__()
        self.spec, self.columns = spec, tuple(columns)
        network = build_network(spec, tensors)
        every = family_called(spec.family).stages(network)
        if stages > len(every):
            raise ConfigError(f"stages: {stages} are more than the {len(every)} of {spec.title}")
        self.network = channels_last(network)
        self.mean: Tensor
        self.deviation: Tensor
        self.register_buffer("mean", torch.tensor(spec.mean), persistent=False)
        self.register_buffer("deviation", torch.tensor(spec.deviation), persistent=False)
        for parameter in network.parameters():
            parameter.requires_grad_(False)
        for parameter in (one for stage in every[-stages:] for one in stage):
            parameter.requires_grad_(True)
        for part in network.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.requires_grad_(False)
        self._freeze_what_is_not_asked()
        if not self.learning():
            raise ConfigError(f"stages: the last {stages} of {spec.title} hold nothing that learns")

    def _freeze_what_is_not_asked(self) -> None:
        """Parameters of what comes behind other columns, a pooling head for one, get no gradient, for which DDP would
        wait."""
        pixels = torch.zeros(1, *self.spec.input_size, 3, dtype=torch.uint8)
        total = torch.stack([column.sum() for column in self(pixels).values()]).sum()
        if total.requires_grad:
            total.backward()  # type: ignore[no-untyped-call]
        for parameter in self.learning():
            parameter.requires_grad_(parameter.grad is not None)
            parameter.grad = None

    def learning(self) -> list[nn.Parameter]:
        """The parameters that learn."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def train(self, mode: bool = True) -> "LearningEncoder":
        """Evaluation mode, whatever is asked for."""
        return super().train(False)

    def forward(self, pixels: Tensor) -> dict[Column, Tensor]:
        """Features of loaded pictures.

        Args:
            pixels: uint8 RGB [B, rows, columns, 3] of the input.

        Returns:
            those of ``columns``, float32: ``pooled`` [B, C], ``grid`` [B, P, D].
        """
        scaled = ((pixels.float() - self.mean) / self.deviation).permute(0, 3, 1, 2)
        pooled, cells = self.network(scaled)
        found = {"pooled": pooled, "grid": cells.flatten(2).transpose(1, 2)}
        return {name: found[name].float() for name in self.columns}

    def tensors(self) -> Tensors:
        """The weights as an encoder's file holds them: float32, on the CPU."""
        return {name: tensor.cpu() for name, tensor in random_weights(self.network).items()}

    def described(self) -> tuple[EncoderSpec, Tensors]:
        """The weights as they are, and the spec of the encoder that has them."""
        tensors = self.tensors()
        return self.spec.model_copy(update={"weights_sha256": digest(tensors)}), tensors
