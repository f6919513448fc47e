"""How an encoder's network runs: eager, one of torch's kernels after the other, or compiled for the machine.

Compiled for a CPU, convolutions take in what follows them, and weights lie as the processor's kernels want them. What
comes out differs by rounding, as it does from processor to processor: a spec says nothing of it.
"""

import os
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from captioner.config import Runtime
from captioner.encoders.encoder import CPU_IMAGES, Encoder

# By how much the compiled network must be the faster one.
GAIN = 1.1
# Seconds of eager work that repay a start-up: compiling takes half a minute of a core, once a machine, and six seconds
# in every process.
WORTH_SECONDS = 200.0
_TURNS, _TURN_SECONDS = 5, 0.3


class _Filled(nn.Module):
    """A compiled network, which is made for one size of batch: smaller ones are filled up."""

    def __init__(self, network: Any):
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        count = len(pixels)
        if count < CPU_IMAGES:
            whole = pixels.new_zeros((CPU_IMAGES, *pixels.shape[1:]))
            pixels = whole.to(memory_format=torch.channels_last).copy_(_repeated(pixels))
        return tuple(found[:count] for found in self.network(pixels))


def _repeated(pixels: Tensor) -> Tensor:
    return pixels[torch.arange(CPU_IMAGES) % len(pixels)]


def compile_encoder(encoder: Encoder) -> str | None:
    """Have an encoder run compiled from now on; on a CPU some six seconds where this machine has compiled it before.

    Returns:
        why it stays as it is; None where it does not.
    """
    if encoder.device.type != "cpu":
        encoder.network.compile()
        return None
    # What torch asks for, too.
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        return "there is no C++ compiler (g++)"
    _prepare_cache()
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import CppCompileError

    try:
        network = compiled(encoder.network, example(encoder, CPU_IMAGES))
    except (TorchDynamoException, CppCompileError) as error:
        return f"it does not compile ({str(error).strip().splitlines()[0][:200]})"
    encoder.network = _Filled(network)
    return None


@torch.inference_mode()
def compiled(network: nn.Module, pixels: Tensor) -> Any:
    """A network compiled for batches like ``pixels``.

    Raises:
        TorchDynamoException, CppCompileError: it does not compile.
    """
    from torch._inductor import config

    found: Any = torch.compile(network, dynamic=False)
    # Not among the options of ``compile``, which come too late: whoever traces the network must know that its weights
    # are constants.
    with config.patch(freezing=True):
        found(pixels)
    return found


def choose_runtime(encoder: Encoder, images: int) -> tuple[Runtime, str | None]:
    """What an encoder on a CPU should encode ``images`` with, by measuring; it may be compiled afterwards.

    Returns:
        the runtime; and why compiling was left out, where it would have been worth it.
    """
    eager = encoder.network
    pixels = example(encoder, CPU_IMAGES)
    if images / rates({"eager": eager}, pixels)["eager"] < WORTH_SECONDS:
        return "eager", None
    if reason := compile_encoder(encoder):
        return "eager", reason
    found = rates({"eager": eager, "compiled": encoder.network}, pixels)
    return ("compiled" if found["compiled"] > GAIN * found["eager"] else "eager"), None


@torch.inference_mode()
def rates(
    networks: dict[str, Callable[[Tensor], Any]],
    pixels: Tensor,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Images per second of each network, in turns, so that other work on the machine slows all alike."""
    found: dict[str, list[float]] = {name: [] for name in networks}
    for network in networks.values():
        network(pixels)
    for _ in range(_TURNS):
        for name, network in networks.items():
            done, begun = 0, clock()
            while clock() - begun < _TURN_SECONDS:
                network(pixels)
                done += len(pixels)
            found[name].append(done / (clock() - begun))
    return {name: statistics.median(values) for name, values in found.items()}


def example(encoder: Encoder, images: int) -> Tensor:
    """A batch as the network gets it: channels-last."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(images, *encoder.spec.input_size, 3, generator=generator)
    return pixels.to(encoder.dtype).permute(0, 3, 1, 2)


def _prepare_cache() -> None:
    """Where what was compiled stays from run to run: in the user's home, for what lies there is run."""
    # One process would start as many more as there are cores, each with the tensor library.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "captioner/compiled"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
