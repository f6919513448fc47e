"""Whatever a picture does to the process that loads it, the others are loaded."""

import ctypes
import errno
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from captioner.errors import ImageError, ImageTooLargeError, ImageTypeError
from captioner.images.fence import Fence
from captioner.images.load import Fit, load_image
from tests.pictures import bomb, picture
from tests.processes import descendants

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 0.5


def recurse(data: bytes) -> Any:
    return recurse(data)


def quote(data: bytes) -> None:
    raise ValueError("caf\udce9")


def spin(data: bytes) -> None:
    while True:
        pass


def fill_memory(data: bytes) -> None:
    taken = []
    for _ in range(20 * 2**4):
        taken.append(np.ones(2**26, np.uint8))


def stop_this(data: bytes, how: signal.Signals) -> None:
    os.kill(os.getpid(), how)


def once(data: bytes) -> dict[str, Any]:
    """Ends its process the first time: the picture's bytes are the path of a file that then is there."""
    mark = Path(data.decode())
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return {"bytes": data}


DEEDS = {
    b"raise": lambda data: 1 // 0,
    b"recurse": recurse,
    b"quote": quote,
    b"exit": lambda data: sys.exit(0),
    b"interrupt": partial(stop_this, how=signal.SIGINT),
    b"leave": lambda data: os._exit(0),
    b"abort": lambda data: os.abort(),
    b"kill": partial(stop_this, how=signal.SIGKILL),
    b"ask for 20 GiB": lambda data: bytearray(20 * 2**30),
    b"take 20 GiB": fill_memory,
    b"spin": spin,
    b"hang": lambda data: ctypes.PyDLL(None).sleep(1000),  # holds the interpreter's lock
}


def misbehave(data: bytes) -> dict[str, Any]:
    """What the picture says is done."""
    if data.startswith(b"/"):
        return once(data)
    if data in DEEDS:
        DEEDS[data](data)
    return {"bytes": data, "length": len(data), "array": np.frombuffer(data, np.uint8)}


@pytest.fixture(scope="module")
def fence() -> Fence:
    return Fence(misbehave, memory=2**28)


def test_pictures_are_loaded_as_without_a_fence() -> None:
    pictures = [picture(number, "PNG", (400, 300)) for number in range(20)]
    pictures[3:3] = [b"no picture", bomb(), picture(0)[:200], b""]
    load = partial(load_image, fit=Fit((224, 160)), thumbnail=True)
    found = Fence(load).load([*map(memoryview, pictures)])
    kinds = [type(one) for one in found[3:7]]
    assert kinds == [ImageTypeError, ImageTooLargeError, ImageError, ImageError]
    for data, one in zip(pictures, found, strict=True):
        if isinstance(one, ImageError):
            with pytest.raises(type(one)) as refusal:
                load(data)
            assert str(refusal.value) == str(one)
            continue
        expected = load(data)
        assert one.keys() == {"pixels", "thumbnail", "box"}
        assert one["pixels"].dtype == np.uint8
        np.testing.assert_array_equal(one["pixels"], expected.pixels)
        assert one["thumbnail"] == expected.thumbnail
        assert tuple(one["box"]) == expected.box


def test_more_than_is_handed_over_at_once_comes_back_in_order(fence: Fence) -> None:
    pictures = [bytes([number]) * (9 * 2**20) for number in range(8)] + [bytes(2**26), b"small"]
    found = fence.load(pictures)
    assert [one["length"] for one in found] == [len(data) for data in pictures]
    assert all(one["bytes"] == data for one, data in zip(found, pictures, strict=True))
    assert all(one["array"].tobytes() == data for one, data in zip(found, pictures, strict=True))


REASONS = {
    b"raise": "cannot be loaded: ZeroDivisionError: ",
    b"recurse": "cannot be loaded: RecursionError",
    b"quote": r"cannot be loaded: ValueError: caf\udce9",
    b"exit": "cannot be loaded: SystemExit: 0",
    b"interrupt": "cannot be loaded: KeyboardInterrupt",
    b"leave": "ends the process (status 0)",
    b"abort": "ends the process (SIGABRT)",
    b"kill": "ends the process (SIGKILL)",
    b"ask for 20 GiB": "takes more than ",
    b"take 20 GiB": "takes more than ",
    b"spin": "not loaded after 0.5 s of processor time",
    b"hang": "not loaded after 5 s",
}


@pytest.mark.parametrize("deed", REASONS, ids=bytes.decode)
def test_a_picture_that_bites_is_one_error_and_the_others_are_loaded(
    fence: Fence, deed: bytes
) -> None:
    pictures = [b"first", b"second", deed, b"last"]
    if deed in (b"spin", b"hang"):
        fence = Fence(misbehave, seconds=SECONDS)
    found = fence.load(pictures)
    for data, one in zip(pictures, found, strict=True):
        if data == deed:
            assert isinstance(one, ImageError)
            assert REASONS[deed] in str(one)
            assert "\n" not in str(one)
        else:
            assert one["bytes"] == data


def test_a_picture_whose_process_somebody_else_killed_is_loaded(
    fence: Fence, tmp_path: Path
) -> None:
    pictures = [str(tmp_path / f"{number}").encode() for number in range(3)]
    found = fence.load([b"first", *pictures])
    assert [one["bytes"] for one in found] == [b"first", *pictures]


def test_a_process_killed_while_it_has_nothing_to_do_costs_nothing(fence: Fence) -> None:
    fence.load([b"one"])
    children = set(descendants(os.getpid())) - {os.getpid()}
    for child in children:
        os.kill(child, signal.SIGKILL)
    assert fence.load([b"one", b"two"])[1]["bytes"] == b"two"


def test_threads_have_a_process_each(fence: Fence) -> None:
    barrier = threading.Barrier(3)

    def load(number: int) -> list[Any]:
        barrier.wait()
        return fence.load([f"{number} {index}".encode() for index in range(200)])

    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(load, range(3)))
    expected = [[f"{number} {index}".encode() for index in range(200)] for number in range(3)]
    assert [[one["bytes"] for one in part] for part in found] == expected
    fence.close()
    assert descendants(os.getpid()) == [os.getpid()]


def test_the_processes_end_with_their_parent() -> None:
    program = (
        "import os; from captioner.images.fence import Fence; from tests.unit.test_fence import misbehave;"
        "fence = Fence(misbehave); fence.load([b'one']);"
        "print(fence._idle[0]._process.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    parent = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True)
    child = Path(f"/proc/{int(parent.stdout)}")
    deadline = time.monotonic() + 20
    while child.exists() and "\nState:\tZ" not in (child / "status").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_machine_that_is_full_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    start, failures = subprocess.Popen, iter([errno.EAGAIN, errno.ENOMEM])

    def fork(*arguments: Any, **options: Any) -> Any:
        if (error := next(failures, None)) is not None:
            raise OSError(error, "injected")
        return start(*arguments, **options)

    monkeypatch.setattr("captioner.images.fence.subprocess.Popen", fork)
    assert Fence(misbehave).load([b"one"])[0]["bytes"] == b"one"


def test_a_loader_that_cannot_be_had_says_why() -> None:
    # As pickled by a parent that has another version.
    with pytest.raises(RuntimeError, match="absent_module"):
        Fence(b"cabsent_module\nload\n.").load([b"one"])
