"""Traces of a run: one file a rank, in Chrome's format as Perfetto reads it, all-reduces named by call site, algorithm
and size; AMD's TraceLens reads them where it is installed (``make tracelens``)."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from tests.support.forked import run_module
from tests.support.ranks import ROOT

NAME = re.compile(r"^L\d+\.(attn\.out|mlp\.down)/allreduce\[shm,\d+B\]$")
READER = """
from TraceLens import TreePerfAnalyzer
analyzer = TreePerfAnalyzer.from_file(sys.argv[1])
names = {event.get("name", "") for event in analyzer.tree.events}
print(sum("/allreduce[" in name for name in names))
"""


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("traces")
    words = ["yalis", "bench", "latency", "--model", "models/demo", "--tp", "2"]
    words += ["--batch-size", "1", "--input-len", "8", "--output-len", "6", "--num-iters", "1"]
    words += ["--num-iters-warmup", "0", "--profile", str(folder)]
    done = run_module(*words, cwd=ROOT, timeout=100)
    assert done.returncode == 0, done.stderr
    return sorted(folder.glob("*.json"))


def test_every_rank_names_its_all_reduces(traces: list[Path]) -> None:
    assert [re.search(r"-rank(\d)-", path.name).group(1) for path in traces] == ["0", "1"]  # type: ignore[union-attr]
    for path in traces:
        events = json.loads(path.read_text())["traceEvents"]
        found = {e["name"] for e in events if NAME.match(str(e.get("name", "")))}
        assert {name.split("/")[0] for name in found} == {
            f"L{layer}.{part}" for layer in range(4) for part in ("attn.out", "mlp.down")
        }


def test_they_keep_the_rules_of_chromes_trace_format(traces: list[Path]) -> None:
    """What Perfetto's importer asks for; what breaks these rules it drops, or draws in the wrong place."""
    for path in traces:
        trace = json.loads(path.read_text())
        spans: dict[Any, list[tuple[float, float, str]]] = defaultdict(list)
        named: dict[str, set[Any]] = {"process_name": set(), "thread_name": set()}
        for event in trace["traceEvents"]:
            assert isinstance(event["ph"], str) and len(event["ph"]) == 1, event
            assert isinstance(event["name"], str) and "pid" in event, event
            if event["ph"] == "M":
                if event["name"] in named:
                    assert isinstance(event["args"]["name"], str)
                    named[event["name"]].add(
                        (event["pid"], event["tid"]) if "thread" in event["name"] else event["pid"]
                    )
                continue
            assert isinstance(event["ts"], int | float) and event["ts"] >= 0 and "tid" in event, event
            if event["ph"] == "X":
                assert isinstance(event["dur"], int | float) and event["dur"] >= 0, event
                spans[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"], event["name"]))
            if event["ph"] in "sft":
                assert "id" in event, event
        work = {track for track, found in spans.items() if any("/allreduce[" in name for _, _, name in found)}
        assert work
        for track in work:
            assert track in named["thread_name"] and track[0] in named["process_name"]
            _assert_nested(spans[track])


def _assert_nested(spans: list[tuple[float, float, str]]) -> None:
    """On one track a span lies wholly within another or beside it."""
    open_until: list[float] = []
    for start, end, name in sorted(spans, key=lambda span: (span[0], -span[1])):
        while open_until and open_until[-1] <= start + 1e-3:
            open_until.pop()
        assert not open_until or end <= open_until[-1] + 1e-3, f"{name} outlives the span around it"
        open_until.append(end)


def test_tracelens_reads_them(traces: list[Path]) -> None:
    python = os.environ.get("YALIS_TRACELENS_PYTHON", "")
    if not python:
        pytest.skip("needs TraceLens in an environment of its own: make tracelens builds it and runs this")
    done = subprocess.run([python, "-c", READER, str(traces[0])], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) >= 8
