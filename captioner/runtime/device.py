"""The processor that a network runs on: which one, how many cores and how much memory a container leaves, what is fast.

Limits are those of Linux control groups, versions 1 and 2: a container's quota is in neither ``os.cpu_count()`` nor the
affinity of its processes. Torch, which takes seconds to load, is imported where it is asked: processes that only load
pictures and write tables come here for their cores.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from captioner.config import Compute

_ROOT = Path("/")


def choose_device() -> str:
    """``cuda`` where there is a GPU, else ``cpu``."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def prepare_device(
    device: str | None = None, *, threads: int | None = None, processes: int = 1
) -> str:
    """Set torch's threads for ``device``, where that is a CPU; Ray leaves one to a process that reserves one CPU.

    Args:
        device: ``cpu``, ``cuda`` ...; default: ``choose_device()``.
        threads: of this process; default: its share of the cores.
        processes: how many share the cores.

    Returns:
        the device.
    """
    import torch

    device = device or choose_device()
    if device == "cpu":
        torch.set_num_threads(threads or max(1, num_cores() // processes))
    return device


def num_cores(root: Path = _ROOT) -> int:
    """Whole cores that this process may use, one at least: those of its affinity, as far as a container's quota goes.

    Args:
        root: the file system with the control groups, for tests.
    """
    cores = float(len(os.sched_getaffinity(0)))
    for folder in _control_groups("cpu", root):
        # Version 2 has both numbers in one file. "max" and -1 mean no quota.
        both = _read(folder / "cpu.max").split()
        quota, period = both or (
            _read(folder / "cpu.cfs_quota_us"),
            _read(folder / "cpu.cfs_period_us"),
        )
        if quota.isdecimal() and period.isdecimal():
            cores = min(cores, int(quota) / int(period))
    return max(1, int(cores))


def memory_bytes(root: Path = _ROOT) -> int:
    """Bytes of memory of this machine, as far as a container's limit goes.

    Args:
        root: the file system with the control groups, for tests.
    """
    found = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for folder in _control_groups("memory", root):
        for name in ("memory.max", "memory.limit_in_bytes"):
            limit = _read(folder / name)
            if limit.isdecimal():
                found = min(found, int(limit))
    return found


def _control_groups(controller: str, root: Path) -> Iterator[Path]:
    """Folders with limits of this process: its own group's and those around it, of which each may limit it further."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        top = root / "sys/fs/cgroup"
        if controllers:  # version 1: a hierarchy for each controller
            if controller not in controllers.split(","):
                continue
            top /= controller
        # A container may see its host's path and have only the top: folders that are missing limit nothing.
        folder = top / path.strip("/")
        yield folder
        while folder != top:
            folder = folder.parent
            yield folder


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""


def fast_bfloat16(device: str) -> bool:
    """Whether the device multiplies bfloat16 in hardware (AMX or AVX512-BF16; compute capability 8 on)."""
    import torch

    if device.startswith("cuda"):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def has_avx512() -> bool:
    """Whether this machine's CPUs have AVX512."""
    import torch

    return bool(torch.cpu._is_avx512_supported())


def choose_compute(requested: Literal["auto"] | Compute, device: str) -> Compute:
    """The requested arithmetic, or for ``auto`` the fast one of the device."""
    if requested != "auto":
        return requested
    return "bfloat16" if fast_bfloat16(device) else "float32"
