"""Arrays that processes of a node share: filled once, by one, and gone with the last, however they end."""

import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest

from captioner.training.shared import Array, shared_array

SHAPE = (1000, 7)


def work(name: str, on_disk: bool, filled: Path, seconds: float, pipe: Connection) -> None:
    """Open the array; whoever fills it leaves a file named by its process."""

    def fill(array: Array) -> None:
        (filled / str(os.getpid())).touch()
        array[: len(array) // 2] = 1
        time.sleep(seconds)
        array[:] = np.arange(array.size).reshape(array.shape)

    array = shared_array(name, SHAPE, np.float32, fill, on_disk=on_disk)
    pipe.send(array.sum(dtype=np.float64))
    pipe.recv()


class Others:
    """Processes that open one array."""

    def __init__(self, name: str, on_disk: bool, filled: Path):
        self.name, self.on_disk, self.filled = f"{name}-{os.getpid()}", on_disk, filled
        filled.mkdir()
        self.started: list[tuple[multiprocessing.Process, Connection]] = []

    def start(self, count: int, seconds: float) -> None:
        for _ in range(count):
            here, there = multiprocessing.Pipe()
            arguments = (self.name, self.on_disk, self.filled, seconds, there)
            process = multiprocessing.Process(target=work, args=arguments, daemon=True)
            process.start()
            self.started.append((process, here))

    def kill(self) -> None:
        for process, _ in self.started:
            process.kill()
            process.join()

    def wait_until_filling(self) -> int:
        while not list(self.filled.iterdir()):
            time.sleep(0.01)
        return int(next(self.filled.iterdir()).name)


@pytest.fixture(params=[False, True], ids=["memory", "disk"])
def others(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Others]:
    found = Others(request.node.name, request.param, tmp_path / "filled")
    yield found
    found.kill()


TOTAL = sum(range(SHAPE[0] * SHAPE[1]))


def test_one_of_many_fills_it_and_all_see_the_same(others: Others) -> None:
    others.start(4, seconds=0.3)
    assert [pipe.recv() for _, pipe in others.started] == [TOTAL] * 4
    assert len(list(others.filled.iterdir())) == 1
    # One that comes later, and stays when those before are killed.
    others.start(1, 0)
    assert others.started[-1][1].recv() == TOTAL
    for process, _ in others.started[:4]:
        process.kill()
        process.join()
    others.start(1, 0)
    assert others.started[-1][1].recv() == TOTAL
    assert len(list(others.filled.iterdir())) == 1


def test_another_fills_it_where_the_first_is_killed_meanwhile(others: Others) -> None:
    others.start(3, seconds=2.0)
    filling = others.wait_until_filling()
    os.kill(filling, signal.SIGKILL)
    found = [pipe.recv() for process, pipe in others.started if process.pid != filling]
    assert found == [TOTAL] * 2
    assert len(list(others.filled.iterdir())) == 2


def test_nothing_is_left_when_all_are_killed(others: Others) -> None:
    def left() -> list[str]:
        names = [path.name for path in Path(tempfile.gettempdir()).glob("captioner-*")]
        links = [
            _read(f"/proc/{process}/fd/{number}")
            for process in filter(str.isdecimal, os.listdir("/proc"))
            for number in _list(f"/proc/{process}/fd")
        ]
        return [name for name in (*names, *links) if others.name in name]

    others.start(2, seconds=30)
    others.wait_until_filling()
    assert left()
    others.kill()
    assert left() == []


def test_what_fill_raises_comes_out_and_the_next_one_fills(
    others: Others,
) -> None:
    def broken(array: Array) -> None:
        raise OSError("damaged")

    with pytest.raises(OSError, match="damaged"):
        shared_array(others.name, SHAPE, np.float32, broken, on_disk=others.on_disk)
    others.start(1, 0)
    assert others.started[0][1].recv() == TOTAL


def _list(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _read(link: str) -> str:
    try:
        return os.readlink(link)
    except OSError:
        return ""
