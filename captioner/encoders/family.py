"""What a family of encoders supplies, and how the one that answers to a name is found."""

import importlib
import pkgutil
from abc import ABC, abstractmethod
from functools import cache

from torch import nn

import captioner.encoders
from captioner.config import Compute, EncoderConfig
from captioner.encoders.spec import EncoderSpec
from captioner.encoders.weights import Tensors
from captioner.errors import ConfigError, ModelError


class Family(ABC):
    """Networks that are built alike. A module of ``captioner.encoders`` that has one as ``FAMILY`` is all it takes."""

    family: str
    """Its name; ``encoder.name`` is one of ``names``, or, where there are too many to list, ``FAMILY:NAME``."""

    names: tuple[str, ...] = ()
    """Networks that are asked for without the family's name."""

    @abstractmethod
    def weights(self, config: EncoderConfig) -> tuple[Tensors, str]:
        """The network's float32 tensors, and where they came from.

        Raises:
            ConfigError, ModelError: the settings are wrong, or the weights cannot be had.
        """

    @abstractmethod
    def spec(self, config: EncoderConfig, tensors: Tensors, precision: Compute) -> EncoderSpec:
        """What decides the features of a network with these settings and tensors."""

    @abstractmethod
    def stages(self, network: nn.Module) -> list[list[nn.Parameter]]:
        """Parameters of a network that ``build`` made, stage by stage (or block by block), from its input on."""

    @abstractmethod
    def build(self, spec: EncoderSpec) -> nn.Module:
        """The network with fresh weights: float [B, 3, rows, columns] -> pooled [B, C], feature map [B, D, H, W]."""


@cache
def _families() -> tuple[Family, ...]:
    modules = (
        importlib.import_module(f"{captioner.encoders.__name__}.{found.name}")
        for found in pkgutil.iter_modules(captioner.encoders.__path__)
    )
    return tuple(module.FAMILY for module in modules if hasattr(module, "FAMILY"))


def family_of(name: str) -> tuple[Family, str]:
    """The family of a network by its ``encoder.name``, and the network's name within it.

    Raises:
        ConfigError: there is none.
    """
    prefix, _, rest = name.partition(":")
    for family in _families():
        if name in family.names:
            return family, name
        if not family.names and prefix == family.family and rest:
            return family, rest
    known = [name for one in _families() for name in one.names or (f"{one.family}:NAME",)]
    raise ConfigError(f"encoder.name: {name!r} is not one of {', '.join(sorted(known))}")


def family_called(family: str) -> Family:
    """The family that a spec names.

    Raises:
        ModelError: this release has none of that name.
    """
    for one in _families():
        if one.family == family:
            return one
    raise ModelError(f"this release has no encoders of the family {family!r}")
