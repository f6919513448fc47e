"""A dashboard of our own metrics for Grafana: ``python -m captioner.serving.dashboard > deploy/grafana.json``."""

import json
from typing import Any

from captioner.runtime.progress import IMAGES, REJECTED_IMAGES, TrainingGauges
from captioner.serving.metrics import PREFIX, SERVICE, Metric

_WIDTH, _HEIGHT, _COLUMNS = 8, 7, 3


def dashboard() -> dict[str, Any]:
    """As Grafana imports it; it asks for its Prometheus."""
    images = [_rate(name.removesuffix("_total"), text) for name, text in (IMAGES, REJECTED_IMAGES)]
    training = [
        _panel(text, f"ray_{PREFIX}training_{name}", "{{run}}")
        for name, text in TrainingGauges.NAMES.items()
    ]
    service = [
        _histogram(one) if one.boundaries else _rate(one.name, one.text, one.tags)
        for one in SERVICE
    ]
    missing = _panel("Nodes whose metrics cannot be read", f"ray_{PREFIX}nodes_missing", "")
    panels: list[dict[str, Any]] = []
    top = 0
    for title, group in (
        ("Extraction, captioning and evaluation", images),
        ("Training", training),
        ("Service", [*service, missing]),
    ):
        panels.append({"type": "row", "title": title, "gridPos": _place(0, top, 24, 1)})
        for number, panel in enumerate(group):
            row, column = divmod(number, _COLUMNS)
            place = _place(column * _WIDTH, top + 1 + row * _HEIGHT, _WIDTH, _HEIGHT)
            panels.append(panel | {"gridPos": place})
        top += 1 + _HEIGHT * -(-len(group) // _COLUMNS)
    source = {"name": "source", "type": "datasource", "query": "prometheus", "label": "Prometheus"}
    return {
        "uid": "captioner",
        "title": "captioner",
        "schemaVersion": 39,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [source]},
        "panels": [panel | {"id": number} for number, panel in enumerate(panels, 1)],
    }


def _rate(name: str, text: str, tags: tuple[str, ...] = ()) -> dict[str, Any]:
    by = f" by ({', '.join(tags)})" if tags else ""
    legend = " ".join(f"{{{{{one}}}}}" for one in tags)
    return _panel(f"{text} per second", f"sum{by} (rate(ray_{PREFIX}{name}_total[1m]))", legend)


def _histogram(metric: Metric) -> dict[str, Any]:
    by = ", ".join(("le", *metric.tags))
    name = f"ray_{PREFIX}{metric.name}_bucket"
    expression = f"histogram_quantile(0.95, sum by ({by}) (rate({name}[5m])))"
    unit = "s" if metric.name.endswith("_seconds") else "short"
    legend = " ".join(f"{{{{{one}}}}}" for one in metric.tags)
    return _panel(f"{metric.text}, 95th percentile", expression, legend, unit)


def _panel(title: str, expression: str, legend: str, unit: str = "short") -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "${source}"}
    target = {"refId": "A", "expr": expression, "legendFormat": legend, "datasource": source}
    return {
        "type": "timeseries",
        "title": title,
        "datasource": source,
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
        "targets": [target],
    }


def _place(left: int, top: int, width: int, height: int) -> dict[str, int]:
    return {"x": left, "y": top, "w": width, "h": height}


if __name__ == "__main__":
    print(json.dumps(dashboard(), indent=2))
