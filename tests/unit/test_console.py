"""``captioner NAME`` is ``python -m ray_jobs.NAME``, in a checkout and where the package is installed."""

import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from ray_jobs import __main__ as console

ROOT = Path(__file__).resolve().parents[2]
INSTALLED = """
from importlib.metadata import entry_points
(script,) = entry_points(group="console_scripts", name="captioner")
script.load()()
"""


def test_every_job_is_listed_with_its_first_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = {file.stem for file in (ROOT / "ray_jobs").glob("[!_]*.py")}
    assert {*console.JOBS, console.BENCHMARK} == jobs
    monkeypatch.setattr("sys.argv", ["captioner", "--help"])
    with pytest.raises(SystemExit) as stop:
        console.main()
    assert stop.value.code == 0
    shown = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[2:]]
    assert [name for name, _ in shown] == [*console.JOBS, console.BENCHMARK, console.COMPLETION]
    assert all(text.endswith(".") for _, text in shown)


@pytest.mark.parametrize("arguments", [["nonsense"], ["nonsense", "--help"], []])
def test_an_unknown_or_missing_name_is_one_line_and_status_2(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["captioner", *arguments])
    with pytest.raises(SystemExit) as stop:
        console.main()
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: captioner: ")
    assert "extract_features, train," in error
    assert error.count("\n") == 1


def test_a_job_gets_the_arguments_behind_its_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["captioner", "evaluate", "--split", "nothing", "--model=m"])
    with pytest.raises(SystemExit) as stop:
        console.main()
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "--output: missing; --split: should be 'train'," in error


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([""], [*console.JOBS]),
        (["ev"], ["evaluate"]),
        (["extract_features", "--encoder.na"], ["--encoder.name"]),
        (["serve", "--po"], ["--port"]),
    ],
)
def test_a_shell_completes_names_and_flags(words: list[str], expected: list[str]) -> None:
    script = subprocess.run(
        [sys.executable, "-m", "ray_jobs", "completion", "bash"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    quoted = " ".join(f"'{word}'" for word in ["captioner", *words])
    ask = f'COMP_WORDS=({quoted}); COMP_CWORD={len(words)}; _tyro_captioner; printf "%s\\n" "${{COMPREPLY[@]}}"'
    offered = subprocess.run(
        ["bash", "-c", f"{script}\n{ask}"], capture_output=True, text=True, check=True
    ).stdout.split()
    assert set(expected) <= set(offered)
    if words != [""]:
        assert offered == expected


@pytest.mark.parametrize("arguments", [["tcsh"], []])
def test_an_unknown_shell_is_one_line(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "ray_jobs", "completion", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "is not one of bash, zsh, fish" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("job", ["", "train"])
def test_a_reader_of_help_may_leave(job: str) -> None:
    command = f"{sys.executable} -u -m ray_jobs {job} --help | true"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == ""


def test_the_environment_has_the_command(tmp_path: Path) -> None:
    """Made by ``make install``."""
    command = Path(sys.executable).with_name("captioner")
    done = subprocess.run([command, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "extract_features" in done.stdout


def test_a_package_holds_the_jobs_and_no_benchmarks(tmp_path: Path) -> None:
    build = [
        sys.executable,
        "-m",
        "hatchling",
        "build",
        "--target",
        "wheel",
        "--directory",
        tmp_path,
    ]
    subprocess.run(build, cwd=ROOT, capture_output=True, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    assert {file.name for file in site.iterdir() if file.suffix != ".dist-info"} == {
        "captioner",
        "ray_jobs",
    }
    assert (site / "captioner/py.typed").is_file()

    def captioner(*arguments: str) -> "subprocess.CompletedProcess[str]":
        # -S leaves out what an editable installation has put on the path.
        program = (
            f"import sys; sys.path += {[str(site), sysconfig.get_path('purelib')]}\n{INSTALLED}"
        )
        command = [sys.executable, "-I", "-S", "-c", program, *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    listed = captioner("--help")
    assert (listed.returncode, listed.stderr) == (0, "")
    assert "evaluate" in listed.stdout
    page = captioner("serve", "--help")
    assert (page.returncode, page.stderr) == (0, "")
    assert "usage: captioner serve " in page.stdout
    assert "--model STR" in page.stdout
    absent = captioner("benchmark", "extract")
    assert absent.returncode == 2
    assert absent.stderr.startswith("error: benchmark: ")
    assert absent.stderr.count("\n") == 1
