"""What Prometheus and Grafana get: every node that answers, each metric of ours on the dashboard."""

import json
import re
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from prometheus_client.parser import text_string_to_metric_families

from captioner.runtime.progress import IMAGES, REJECTED_IMAGES, TrainingGauges
from captioner.serving.dashboard import dashboard
from captioner.serving.metrics import SERVICE, merge, read_all
from tests.head import ROOT, free_port


@pytest.fixture
def node() -> Iterator[str]:
    class Node(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"# HELP ray_captioner_x y\nray_captioner_x 1\nray_other 2\n")

        def log_message(self, *_: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Node)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/metrics"
    server.shutdown()
    server.server_close()


def test_dead_node_takes_no_other_with_it(node: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")  # of no use to us
    dead = f"http://127.0.0.1:{free_port()}/metrics"
    text = merge(read_all([node, dead, node]))
    assert text.splitlines()[:2] == ["# HELP ray_captioner_x y", "ray_captioner_x 1"]
    assert "ray_captioner_nodes_missing 1\n" in text
    with pytest.raises(OSError, match="refused"):
        merge(read_all([dead]))


@pytest.mark.parametrize(
    "answer", [b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\nray", b"no\r\n", b""]
)
def test_node_that_dies_within_its_answer_takes_no_other_with_it(node: str, answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as dying:

        def die() -> None:
            connection, _ = dying.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(answer)

        thread = threading.Thread(target=die)
        thread.start()
        text = merge(read_all([f"http://127.0.0.1:{dying.getsockname()[1]}/metrics", node]))
        thread.join()
    assert "ray_captioner_x 1\n" in text
    assert "ray_captioner_nodes_missing 1\n" in text


def test_lines_of_a_metric_stand_together_whatever_the_node() -> None:
    nodes = [
        f"# HELP ray_captioner_{metric} m\n# TYPE ray_captioner_{metric} counter\n"
        f'ray_captioner_{metric}{{node="{node}"}} {node}.0\n'
        for metric in ("a_total", "b_total")
        for node in (1, 2)
    ]
    text = merge([nodes[0] + nodes[2] + "# HELP ray_x y\nray_x 1\n", nodes[1] + nodes[3]])
    found = {
        family.name: [sample.value for sample in family.samples]
        for family in text_string_to_metric_families(text)
    }
    assert found == {
        "ray_captioner_a": [1, 2],
        "ray_captioner_b": [1, 2],
        "ray_captioner_nodes_missing": [0],
    }


def test_dashboard_is_the_one_that_is_shipped_and_shows_every_metric_of_ours() -> None:
    text = (ROOT / "deploy/grafana.json").read_text()
    assert json.loads(text) == dashboard(), (
        "python -m captioner.serving.dashboard > deploy/grafana.json"
    )
    shown = set(re.findall(r"ray_captioner_(\w+)", text))
    wanted = {
        *(f"{one.name}_bucket" if one.boundaries else f"{one.name}_total" for one in SERVICE),
        *(f"training_{name}" for name in TrainingGauges.NAMES),
        IMAGES[0], REJECTED_IMAGES[0], "nodes_missing",
    }  # fmt: skip
    assert shown == wanted
    # Nothing else is exported: every name of a metric is one of these.
    files = (ROOT / "captioner").rglob("*.py")
    made = {one.stem for one in files if re.search(r"metrics\.(Counter|Gauge)\(", one.read_text())}
    assert made == {"progress", "metrics"}


def test_panels_lie_beside_each_other() -> None:
    places = [one["gridPos"] for one in dashboard()["panels"]]
    cells = [
        (x, y)
        for place in places
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
