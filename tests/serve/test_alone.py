"""``python -m ray_jobs.serve`` as a person starts it: its own Ray, tokens from a file, a clean end."""

import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from captioner.serving import run
from ray_jobs.serve import main
from tests.head import ROOT, free_port
from tests.pictures import picture
from tests.serve.service import Service

pytestmark = pytest.mark.timeout(900)


def test_service_starts_asks_for_its_token_and_stops(
    models: dict[str, str], tmp_path: Path
) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("secret\n")
    port = free_port()
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "ray_jobs.serve", "--model", models["v1"], "--port", str(port),
             "--token-file", str(tokens)],
            cwd=ROOT, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
    service = Service(f"http://127.0.0.1:{port}", process.pid)
    try:
        service.wait_until_ready(process)
        assert service.caption(picture(0)).status_code == 401
        # Ray Serve's proxy answers this one itself.
        assert httpx.get(f"{service.url}/-/routes").status_code == 401
        headers = {"authorization": "Bearer secret"}
        models_found = httpx.get(f"{service.url}/v1/models", headers=headers).json()["models"]
        assert [one["name"] for one in models_found] == ["v1"]
        good = httpx.post(
            f"{service.url}/v1/captions", content=picture(0), headers=headers, timeout=30
        )
        assert good.status_code == 200
        assert listening(process.pid, port) == {"127.0.0.1"}
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        text = log.read_text()
        print(text)  # shown where the test fails
    assert f"serving v1 at http://127.0.0.1:{port}" in text
    assert "secret" not in text
    with pytest.raises(httpx.ConnectError):
        httpx.get(service.url)


def listening(pid: int, port: int) -> set[str]:
    """Addresses on which something listens at a port."""
    rows = Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]
    found = set()
    for row in rows:
        local, state = row.split()[1], row.split()[3]
        address, _, number = local.partition(":")
        if state == "0A" and int(number, 16) == port:
            found.add(socket.inet_ntoa(bytes.fromhex(address)[::-1]))
    return found


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        ([], {}, "model"),
        (["--model", "{tmp}/absent"], {}, "is not a model directory"),
        (["--model", "{model}", "--port", "{taken}"], {}, "Address already in use"),
        (["--model", "{model}", "--token-file", "{tmp}/absent"], {}, "cannot read"),
        (["--model", "{model}"], {"CAPTIONER_TOKENS": ""}, "CAPTIONER_TOKENS: there is no token"),
        (["--model", "a={model}", "--model", "a={model}"], {}, "two are called 'a'"),
        (["--model", "{model}", "--token", "secret"], {}, "--token"),
    ],
)
def test_wrong_input_is_one_line_and_status_2_before_ray_starts(
    models: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    variables: dict[str, str],
    message: str,
) -> None:
    monkeypatch.setattr(run, "start_ray", lambda: pytest.fail("Ray was started"))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        values = {"tmp": tmp_path, "model": models["v1"], "taken": taken.getsockname()[1]}
        monkeypatch.setattr("sys.argv", ["serve", *(text.format(**values) for text in arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
    assert stop.value.code == 2
    errors = capsys.readouterr().err.splitlines()
    assert [line for line in errors if line.startswith("error: ")] == errors[-1:]
    assert message in errors[-1]
