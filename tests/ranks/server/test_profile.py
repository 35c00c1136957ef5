"""Traces of a running server."""

from __future__ import annotations

import json
from pathlib import Path

from tests.support.server import Server


def test_every_rank_writes_a_trace(two: Server) -> None:
    assert two.post("/stop_profile", {}).error["code"] == "profiler_state"
    assert two.request("POST", "/start_profile").json() == {"status": "started"}
    again = two.request("POST", "/start_profile")
    assert again.status == 409 and "on already" in again.error["message"]
    assert two.complete("This program", max_tokens=8, temperature=0)["usage"]["completion_tokens"] == 8
    answer = two.request("POST", "/stop_profile").json()
    traces = sorted(Path(answer["trace"]).parent.iterdir())
    assert [path.name.split("-")[-2] for path in traces] == ["rank0", "rank1"]
    for path in traces:
        names = {event.get("name", "") for event in json.loads(path.read_text())["traceEvents"]}
        assert any(name.startswith("L3.mlp.down/allreduce[") for name in names)
    assert two.complete("This program", max_tokens=2)["usage"]["completion_tokens"] == 2
