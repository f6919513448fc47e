"""Weights of image networks: read from files without running code, checked against the network, fingerprinted."""

import hashlib
import warnings
from pickle import (
    UnpicklingError,  # what torch.load(weights_only=True) raises on anything but tensors
)

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from captioner import storage
from captioner.errors import ModelError, StoreError

Tensors = dict[str, Tensor]

ENCODER_WEIGHTS = "encoder.safetensors"


def read_weights(uri: str) -> Tensors:
    """The tensors of a ``.safetensors``, ``.pth`` or ``.pt`` file.

    Raises:
        ModelError: it cannot be read, or holds anything but tensors.
    """
    try:
        if uri.endswith(".safetensors"):
            return dict(safetensors.torch.load(storage.read_bytes(uri)))
        if uri.endswith((".pth", ".pt")):
            # Of a pickle that is refused torch would tell twice.
            with storage.open_input(uri) as file, warnings.catch_warnings(action="ignore"):
                loaded = torch.load(file, map_location="cpu", weights_only=True)
            if isinstance(loaded, dict) and all(isinstance(v, Tensor) for v in loaded.values()):
                return dict(loaded)
            raise ModelError(f"encoder.weights: {uri} is not a plain state_dict")
    # KeyError: a dtype unknown to torch.
    except (safetensors.SafetensorError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise ModelError(f"encoder.weights: {uri} cannot be read: {error}") from error
    except StoreError as error:
        raise ModelError(f"encoder.weights: {error}") from error
    except UnpicklingError as error:
        raise ModelError(f"encoder.weights: {uri} is not a plain state_dict") from error
    raise ModelError(f"encoder.weights: {uri} must end in .safetensors, .pth or .pt")


def file_of_weights(weights: str, alternatives: str) -> Tensors:
    """``read_weights`` of what a user gave where it may be a name, too.

    Args:
        alternatives: the names that would have been right, for the message.

    Raises:
        ModelError: there is no such file, or it cannot be read.
    """
    try:
        there = storage.exists(weights)
    except (StoreError, OSError) as error:
        raise ModelError(f"encoder.weights: {weights!r}: {error}") from error
    if not there:
        raise ModelError(f"encoder.weights: {weights!r} is neither {alternatives}, nor a file")
    return read_weights(weights)


def take_weights(network: nn.Module, found: Tensors, name: str) -> Tensors:
    """Those tensors of ``found`` that the network wants, as float32; what it does not want is passed over.

    Raises:
        ModelError: one is missing, or has another shape.
    """
    chosen = {}
    for key, tensor in network.state_dict().items():
        if is_bookkeeping(key):
            continue
        if key not in found:
            raise ModelError(f"encoder.weights: {name} has no {key!r}, which the network wants")
        if found[key].shape != tensor.shape:
            raise ModelError(
                f"encoder.weights: {name} holds {key!r} as {tuple(found[key].shape)}, "
                f"the network wants {tuple(tensor.shape)}"
            )
        chosen[key] = found[key].detach().to(torch.float32).contiguous().clone()
    return chosen


def is_bookkeeping(name: str) -> bool:
    """Whether a tensor is of no use in inference, and absent from many files: a batch norm's count of its batches."""
    return name.endswith("num_batches_tracked")


def random_weights(network: nn.Module) -> Tensors:
    """The tensors that a network was made with."""
    return take_weights(network, dict(network.state_dict()), "random")


def digest(tensors: Tensors) -> str:
    """SHA-256 over names and values, whatever the order."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode())
        found.update(tensors[name].contiguous().numpy().tobytes())
    return found.hexdigest()
