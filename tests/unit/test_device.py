"""Cores and memory that a container leaves, and what torch is told of them."""

import os
from pathlib import Path

import pytest
import torch

from captioner.runtime import device
from captioner.runtime.device import choose_compute, memory_bytes, num_cores, prepare_device


def control_groups(root: Path, own: str, limits: dict[str, str]) -> Path:
    """A file system in which a process belongs to the groups ``own`` says, and these files limit them."""
    for name, text in {"proc/self/cgroup": own, **limits}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


@pytest.fixture
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))


VERSION_1 = "4:memory:/docker/1f2e\n2:cpuset:/\n1:cpu,cpuacct:/docker/1f2e\n0::/"


@pytest.mark.parametrize(
    ("own", "limits", "cores"),
    [
        ("0::/", {"sys/fs/cgroup/cpu.max": "300000 100000"}, 3),
        ("0::/", {"sys/fs/cgroup/cpu.max": "250000 100000"}, 2),
        ("0::/", {"sys/fs/cgroup/cpu.max": "50000 100000"}, 1),
        ("0::/", {"sys/fs/cgroup/cpu.max": "max 100000"}, 8),
        ("0::/", {"sys/fs/cgroup/cpu.max": "6400000 100000"}, 8),
        (
            "0::/pod/container",
            {
                "sys/fs/cgroup/pod/container/cpu.max": "max 100000",
                "sys/fs/cgroup/pod/cpu.max": "200000 100000",
            },
            2,
        ),
        (
            VERSION_1,
            {
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "400000",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            4,
        ),
        (
            VERSION_1,
            {
                "sys/fs/cgroup/cpu/docker/1f2e/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/docker/1f2e/cpu.cfs_period_us": "100000",
            },
            8,
        ),
    ],
)
@pytest.mark.usefixtures("eight_cores")
def test_cores_are_those_of_the_quota(
    tmp_path: Path, own: str, limits: dict[str, str], cores: int
) -> None:
    assert num_cores(control_groups(tmp_path, own, limits)) == cores


@pytest.mark.usefixtures("eight_cores")
def test_without_control_groups_cores_are_those_of_the_affinity(tmp_path: Path) -> None:
    assert num_cores(tmp_path) == 8


@pytest.mark.parametrize(
    ("own", "name"),
    [
        ("0::/", "sys/fs/cgroup/memory.max"),
        (VERSION_1, "sys/fs/cgroup/memory/memory.limit_in_bytes"),
    ],
)
def test_memory_is_that_of_the_limit(tmp_path: Path, own: str, name: str) -> None:
    assert memory_bytes(control_groups(tmp_path, own, {name: str(2**26)})) == 2**26
    all_of_it = memory_bytes(control_groups(tmp_path, own, {name: "max"}))
    assert all_of_it == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    # What version 1 says where there is no limit.
    assert memory_bytes(control_groups(tmp_path, own, {name: str(2**63 - 4096)})) == all_of_it


def test_threads_are_the_asked_ones_or_a_share_of_the_cores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    monkeypatch.setattr(device, "num_cores", lambda: 5)
    assert prepare_device("cpu") == "cpu"
    prepare_device("cpu", processes=2)
    prepare_device("cpu", processes=9)
    prepare_device("cpu", threads=3, processes=2)
    assert prepare_device("cuda:1", threads=3) == "cuda:1"
    assert told == [5, 2, 1, 3]


def test_asked_arithmetic_is_taken_and_auto_is_the_fast_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert choose_compute("bfloat16", "cpu") == "bfloat16"
    assert choose_compute("float32", "cuda") == "float32"
    for fast, compute in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(device, "fast_bfloat16", lambda _, fast=fast: fast)
        assert choose_compute("auto", "cpu") == compute
