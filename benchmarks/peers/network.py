"""The network of the comparison: torchvision's ResNet50 without its classifier, the weights of one seed."""

import torch
from torch import Tensor, nn
from torchvision.models import resnet50

SIDE = 224
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def build() -> nn.Module:
    """Channels-last, ready to encode float32 [B, 3, 224, 224] to [B, 2048]."""
    torch.manual_seed(0)
    network: nn.Module = resnet50()
    network.fc = nn.Identity()
    network.eval().to(memory_format=torch.channels_last)
    return network


def normalise(pixels: Tensor) -> Tensor:
    """uint8 [B, rows, columns, 3] -> float32 [B, 3, rows, columns], channels-last."""
    scaled = (pixels.float() / 255 - torch.tensor(MEAN)) / torch.tensor(DEVIATION)
    return scaled.permute(0, 3, 1, 2)
