"""The script that measures NVRAR between two GPUs: verdicts, table, choice of stages, limits. No GPU."""

from __future__ import annotations

import importlib.util
import json
import sys
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SOURCE = Path(__file__).resolve().parents[3] / "bench" / "nvrar_two_gpus.py"


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("nvrar_two_gpus", SOURCE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


two_gpus = _load()
KIB, MIB = 1 << 10, 1 << 20


def row(kind: str, nbytes: int, us: float, **more: Any) -> dict[str, Any]:
    plan = {"format": "cells", "blocks": 8, "threads": 256}
    return {"kind": kind, "shape": "2x1", "bytes": nbytes, "us": us, "verified": True, **plan, **more}


def document(*rows: dict[str, Any]) -> dict[str, Any]:
    return {"stages": {"some": {"ok": True, "rows": list(rows)}}}


def verdict(doc: dict[str, Any], what: str, nbytes: int) -> Any:
    [found] = [v for v in two_gpus.verdicts(doc) if v.what == what and v.nbytes == nbytes]
    return found


@pytest.mark.parametrize(("us", "met"), [(3.0, True), (3.05, False)])
def test_ratio_to_nccl(us: float, met: bool) -> None:
    doc = document(row("plain", 8 * KIB, us), row("nccl", 8 * KIB, 10.5))
    found = verdict(doc, "times NCCL's latency", 8 * KIB)
    assert (found.measured, found.target, found.met) == (pytest.approx(10.5 / us), 3.5, met)
    assert verdict(doc, "us", 8 * KIB).met is True, "3.3 us are asked of both"
    assert verdict(doc, "times NCCL's latency", 2 * MIB).met is None, "not measured"
    assert verdict(doc, "us with residual and norm", 16 * KIB).met is None


def test_wrong_sums_are_a_miss_and_other_shapes_or_variants_do_not_count() -> None:
    fast = row("plain", MIB, 1.0)
    for change in ({"shape": "1x2"}, {"kind": "ordinary"}, {"kind": "plain (nvrar_peers-few_looks)"}):
        assert verdict(document({**fast, **change}), "us", MIB).met is None
    assert verdict(document({**fast, "verified": False}), "us", MIB).met is False
    assert verdict(document({**fast, "verified": False}, row("plain", MIB, 7.0)), "us", MIB).measured == 7.0


def test_pipeline_under_mps() -> None:
    doc = document(row("pipeline", MIB, 0, shape="2x4", graph=False, ratio=9.0))
    what = "2x4 under MPS (emulated): times the pipeline's latency"
    assert verdict(doc, what, MIB).met is None, "both in a graph is what counts"
    doc["stages"]["other"] = {"rows": [row("pipeline", MIB, 0, shape="2x4", graph=True, ratio=1.9)]}
    assert (verdict(doc, what, MIB).measured, verdict(doc, what, MIB).met) == (1.9, False)


def test_every_target_of_the_project_is_judged() -> None:
    found = two_gpus.verdicts(document())
    assert len(found) == 9 + 8 + 6 + 10 and all(v.met is None for v in found)
    assert two_gpus.verdict_lines(document())[-1] == "0 met, 0 missed, 33 not measured"


def test_table_takes_the_fastest_format() -> None:
    doc = document(row("plain", MIB, 6.2), row("plain", MIB, 5.9, format="dense", blocks=64), row("nccl", MIB, 19.3))
    [line] = [line for line in two_gpus.table(doc).splitlines() if line.startswith("| 1 MiB ")]
    assert line == "| 1 MiB | 5.90 | 6.20 | 5.90 | - | - | 19.30 | - | - | - | - | - | dense 64x256 |"
    widths = {line.count("|") for line in two_gpus.table(doc).splitlines()}
    assert len(widths) == 1, "head, rule and rows have the same columns"


def test_lines_that_were_cut_off_are_left_out() -> None:
    assert two_gpus.json_rows('init 0.2 s\n{"us": 1}\n{"us": 2, "by') == [{"us": 1}]


def test_stages_to_run() -> None:
    doc = {"stages": {"a": {"ok": True}, "b": {"ok": False}}}
    assert two_gpus.pending(["a", "b", "c"], doc, []) == ["b", "c"]
    assert two_gpus.pending(["a", "b", "c"], doc, ["a"]) == ["a"], "asked for: again"
    with pytest.raises(SystemExit, match="no stage 'd'"):
        two_gpus.pending(["a"], doc, ["d"])
    names = [stage.name for stage in two_gpus.stages()]
    assert len(set(names)) == len(names)


def test_a_stage_that_fails_or_has_no_time_stops_nothing(tmp_path: Path) -> None:
    def fails(session: Any, seconds: float) -> list[dict[str, Any]]:
        raise two_gpus.StageFailed("status 1", [row("plain", MIB, 5.0)])

    def breaks(session: Any, seconds: float) -> list[dict[str, Any]]:
        raise OSError("no such program")

    def works(session: Any, seconds: float) -> list[dict[str, Any]]:
        return [row("plain", MIB, 6.0, program="nvrar_peers-few_looks")]

    made = [two_gpus.Stage(name, 10, run) for name, run in (("a", fails), ("b", breaks), ("c", works))]
    saved: list[str] = []
    doc: dict[str, Any] = {"stages": {}}
    two_gpus.run_stages(made, None, doc, 60, lambda now: saved.append(json.dumps(now)))
    assert {name: record["ok"] for name, record in doc["stages"].items()} == {"a": False, "b": False, "c": True}
    assert len(saved) == 3 and json.loads(saved[0])["stages"]["a"]["rows"][0]["us"] == 5.0
    assert "no such program" in doc["stages"]["b"]["error"]
    assert doc["stages"]["c"]["rows"][0]["kind"] == "plain (nvrar_peers-few_looks)"
    two_gpus.run_stages([two_gpus.Stage("d", 10, works), made[2]], None, doc, 0, lambda now: None)
    assert doc["stages"]["d"] == {"ok": False, "error": "no time was left"}
    assert doc["stages"]["c"]["ok"], "an earlier success stays"


def test_a_command_ends_with_all_its_children(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    start = time.monotonic()
    status, output = two_gpus.bounded(["bash", "-c", f"echo begun; sleep 60 & echo $! > {note}; wait"], 1)
    assert status is None and output == "begun\n" and time.monotonic() - start < 10
    state = Path(f"/proc/{note.read_text().strip()}/stat")

    def alive() -> bool:
        try:
            return state.read_text().split()[2] != "Z"
        except FileNotFoundError:
            return False

    while alive():  # the signal was sent; dying takes its time
        assert time.monotonic() - start < 10
        time.sleep(0.05)
    assert two_gpus.bounded(["bash", "-c", "exit 3"], 5)[0] == 3


def test_a_meeting_is_for_all(tmp_path: Path) -> None:
    path = tmp_path / "meeting"
    path.write_bytes(b"\0" * 128)
    one, other = two_gpus.Meeting(path, 0, 2), two_gpus.Meeting(path, 1, 2)
    with pytest.raises(TimeoutError, match="rank 1"):
        one(0.05)
    thread = threading.Thread(target=other)  # its first turn: rank 0 has been there
    thread.start()
    thread.join(5)
    assert not thread.is_alive()
    thread = threading.Thread(target=other)
    thread.start()
    one(5)
    thread.join(5)
    assert not thread.is_alive()
