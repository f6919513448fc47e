"""A job's own lines reach the screen, everything else the log."""

import os
import pty
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BEGIN = """
import logging, os, subprocess, sys
from captioner.config import DemoConfig
from captioner.runtime import command_line
from captioner.runtime.screen import SCREEN
logger = logging.getLogger("captioner.job")
def noise():
    os.write(1, b"native out\\n")
    os.write(2, b"native err\\n")
    print("printed")
    logging.getLogger("ray.data").error("of another")
    subprocess.run(["echo", "of a child"])
def start():
    SCREEN.hide_others()
    noise()
    SCREEN.keep_log(os.environ["SESSION"])
    noise()
"""
NOISE = ["native out", "native err", "printed", "of another", "of a child"]


def run(body: str, tmp_path: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """A job whose body is ``body``, as a process of its own."""
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    program = f"{BEGIN}\ndef job(config):\n{lines}\ncommand_line.run(job, DemoConfig)"
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=ROOT,
        env=os.environ | {"SESSION": str(tmp_path)},
        capture_output=True,
        text=True,
    )


BODY = """start()
logger.info("a line: \\udcff")
logging.getLogger("httpx").warning("of another")
SCREEN.show("asked for")
return "captioner serve"
"""


def test_lines_of_others_are_in_the_log_and_ours_on_the_screen(tmp_path: Path) -> None:
    done = run(BODY, tmp_path)
    assert (done.returncode, done.stdout) == (0, "asked for\n")
    assert done.stderr == "a line: \\udcff\nnext: captioner serve\n"
    (log,) = tmp_path.iterdir()
    logged = log.read_text()
    for line in NOISE:
        assert logged.count(line) >= 2, logged
    assert "INFO captioner.job: a line" in logged


def test_verbose_shows_everything(tmp_path: Path) -> None:
    done = run(BODY, tmp_path, "--verbose")
    assert done.stdout.count("native out") == 2
    assert done.stderr.count("native err") == 2
    assert done.stderr.count("of another") == 3
    assert not list(tmp_path.iterdir())


def test_a_log_that_the_session_does_not_take_lies_among_temporary_files(tmp_path: Path) -> None:
    done = run("start()\nSCREEN.say(SCREEN.log)", tmp_path / "absent")
    log = Path(done.stderr.strip())
    try:
        assert log.parent == Path(tempfile.gettempdir())
        assert "native out" in log.read_text()
    finally:
        log.unlink()


def test_what_nobody_foresaw_is_one_line_with_its_cause_and_the_log(tmp_path: Path) -> None:
    done = run('start()\nraise RuntimeError("a wheel came off\\nand rolled away")', tmp_path)
    (log,) = tmp_path.iterdir()
    assert done.returncode == 1
    assert done.stderr == (
        f"error: RuntimeError: a wheel came off and rolled away (more is in {log})\n"
    )
    assert "Traceback" in log.read_text()
    # Before Ray is there nothing is hidden, a defect's trace least of all.
    assert "Traceback" in run('raise RuntimeError("a wheel came off")', tmp_path).stderr


def test_who_waits_for_the_end_of_a_job_waits_for_no_child_of_it(tmp_path: Path) -> None:
    done = run('start()\nsubprocess.Popen(["sleep", "20"])\nSCREEN.say("over")', tmp_path)
    assert done.stderr == "over\n"


def test_a_terminal_has_one_line_of_progress_that_rewrites_itself(tmp_path: Path) -> None:
    body = """start()
SCREEN.pass_by("1 of 3")
SCREEN.pass_by("2 of 3" + " and so on" * 50)
logger.info("a line")
SCREEN.pass_by("3 of 3", last=True)
SCREEN.show("asked for")"""
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    program = f"{BEGIN}\ndef job(config):\n{lines}\ncommand_line.run(job, DemoConfig)"
    ours, theirs = pty.openpty()
    with open(ours, "rb", buffering=0) as terminal:
        os.set_blocking(ours, False)
        subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT, env=os.environ | {"SESSION": str(tmp_path)},
            stdin=theirs, stdout=theirs, stderr=theirs, check=True,
        )  # fmt: skip
        seen = terminal.read().decode().replace("\r\n", "\n")
        os.close(theirs)
    clear = "\r\033[K"
    before, long, after = (
        seen.partition("2 of 3 and so on")[0],
        seen.split(clear)[1],
        seen.split(clear)[2:],
    )
    assert before == f"1 of 3{clear}"
    assert len(long) < 500
    assert after == [f"a line\n{long}", "3 of 3\nasked for\n"]


def test_an_error_is_the_last_thing_on_a_terminal(tmp_path: Path) -> None:
    program = f"""{BEGIN}
from captioner.errors import StoreError
def job(config):
    SCREEN.wait_for("starting")
    raise StoreError("nothing is there")
command_line.run(job, DemoConfig)"""
    done = subprocess.run(
        ["script", "-qec", f"'{sys.executable}' -c \"$PROGRAM\"", "/dev/null"],
        cwd=ROOT, env=os.environ | {"PROGRAM": program}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    shown = done.stdout.replace("\n", "")
    assert re.fullmatch(r"starting \.\.\.(\s*\033\[K)+error: nothing is there\s*", shown), repr(
        shown
    )


def test_a_log_has_a_line_of_progress_now_and_then_and_the_last(tmp_path: Path) -> None:
    done = run(
        'for number in range(100):\n    SCREEN.pass_by(f"{number} of 99", last=number == 99)',
        tmp_path,
    )
    assert done.stderr == "99 of 99\n"


def test_a_job_goes_on_when_nobody_reads_what_it_says(tmp_path: Path) -> None:
    output = tmp_path / "done"
    program = f"""{BEGIN}
def job(config):
    start()
    for _ in range(1000):
        logger.info("x" * 1000)
        SCREEN.show("y" * 1000)
    open({str(output)!r}, "w").close()
command_line.run(job, DemoConfig)"""
    reader = subprocess.run(
        ["bash", "-c", '"$0" -c "$1" 2>&1 | head -n 1', sys.executable, program],
        cwd=ROOT, env=os.environ | {"SESSION": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert reader.stderr == ""
    assert reader.stdout == f"{'x' * 1000}\n"
    assert output.exists()


@pytest.mark.parametrize("size", ["0 0", "20 5"])
def test_a_terminal_of_any_width_will_do(size: str, tmp_path: Path) -> None:
    rows, columns = size.split()
    program = f"{BEGIN}\ndef job(config):\n    SCREEN.pass_by('1 of 3' * 9)\ncommand_line.run(job, DemoConfig)"
    command = f"stty rows {rows} cols {columns}; exec '{sys.executable}' -c \"$PROGRAM\""
    done = subprocess.run(
        ["script", "-qec", command, "/dev/null"],
        cwd=ROOT, env=os.environ | {"PROGRAM": program}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0
    assert "Traceback" not in done.stdout
    assert "1 of" in done.stdout
