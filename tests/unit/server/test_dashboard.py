"""The Grafana dashboard asks only for what the server's /metrics holds."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.ranks import ROOT
from yalis.config import EngineConfig
from yalis.engine.messages import AllReduceStats, CollectiveStats, EngineStats, RankState, Status, StepTimes
from yalis.server.metrics import Metrics

DASHBOARD = json.loads((ROOT / "deploy" / "grafana" / "yalis.json").read_text())
NAME = re.compile(r"\b(?:vllm|yalis):\w+")


@pytest.fixture(scope="module")
def series() -> dict[str, set[str]]:
    """Labels of each series that a server with a running engine exposes."""
    stats = EngineStats(StepTimes(steps=3), 0, 0, 0, 0.5, 1, 0)
    collectives = [CollectiveStats("tp", "intra", "shm", 0.1, 3, 4096)]
    ranks, all_reduces = [RankState(0, "n1", 1, "idle", 3, 0.1)], [AllReduceStats("tp", "shm", 3, 4096)]
    status = Status(ranks, "", 0.0, stats, [1], collectives, all_reduces=all_reduces, waited_s={"tp": 0.1})
    client = SimpleNamespace(status=status, status_age_s=0.0, info={})
    pace = SimpleNamespace(step_tokens=[4])
    frontend: Any = SimpleNamespace(client=client, pace=pace, healthy=True, phase="ready", restarts=0, num_admitted=1)
    frontend.config = EngineConfig("m")
    metrics = Metrics("m", frontend)
    metrics.lost(1)
    metrics.http("/v1/completions", "POST", 200)
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def queries() -> list[str]:
    exprs = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]
    exprs += [v["query"]["query"] for v in DASHBOARD["templating"]["list"] if v["type"] == "query"]
    return exprs


def test_every_metric_is_exported(series: dict[str, set[str]]) -> None:
    asked = {name for expr in queries() for name in NAME.findall(expr)}
    assert len(asked) > 25
    assert sorted(asked - series.keys()) == []


def test_every_label_is_exported(series: dict[str, set[str]]) -> None:
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", []):
            expr = target["expr"]
            labels = {label for names in NAME.findall(expr) for label in series[names]}
            used = {name.strip() for group in re.findall(r"by \(([^)]*)\)", expr) for name in group.split(",")}
            used |= set(re.findall(r"(\w+)=~?\"", expr)) | set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            assert used <= labels, (panel["title"], used - labels)


def test_what_operators_need_is_asked() -> None:
    text = " ".join(queries())
    for name in ("yalis:healthy", "yalis:rank_up", "yalis:collective_seconds", "vllm:time_to_first_token_seconds"):
        assert name in text


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        box = panel["gridPos"]
        cells = {(x, y) for x in range(box["x"], box["x"] + box["w"]) for y in range(box["y"], box["y"] + box["h"])}
        assert not cells & taken and box["x"] + box["w"] <= 24, panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
