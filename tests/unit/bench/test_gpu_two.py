"""The script that measures the engine on two GPUs: verdicts, what is left to do, limits, failures. No GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SOURCE = Path(__file__).resolve().parents[3] / "bench" / "gpu_two.py"


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_two", SOURCE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


gpu_two = _load()


def measured(cells: dict[str, float], **more: Any) -> dict[str, Any]:
    found = {name: {"what": "step", "ms": {"median": ms}} for name, ms in cells.items()}
    return {"ok": True, "record": {"results": {"cells": found, **more}}}


def verdict(document: dict[str, Any], part: str, what: str) -> Any:
    [found] = [v for v in gpu_two.verdicts(document) if (v.part, v.what) == (part, what)]
    return found


@pytest.mark.parametrize(("ms", "met"), [(2.35, True), (2.351, False)])
def test_a_goal_is_met_or_missed(ms: float, met: bool) -> None:
    document = {"parts": {"8b-nvrar": measured({"1x512+129": ms})}}
    found = verdict(document, "8b-nvrar", "1x512+129")
    assert (found.measured, found.goal, found.vllm, found.met) == (ms, 2.35, 3.50, met)
    assert verdict(document, "8b-nvrar", "8x512+129").met is None, "not measured"
    assert verdict(document, "8b-tp1", "1x512+129").met is None, "nothing ran"


def test_the_start_counts_to_the_first_token() -> None:
    results = {"ready_s": 59.5, "summary_ms": {"ttft": {"p50": 400.0}}}
    document = {"parts": {"start": {"ok": True, "record": {"results": results}}}}
    assert verdict(document, "start", "seconds to the first token").met is True
    results["summary_ms"]["ttft"]["p50"] = 600.0
    assert verdict(document, "start", "seconds to the first token").met is False


def test_a_miss_says_where_the_time_went_and_a_goal_that_was_met_does_not() -> None:
    parts_us = {"GEMM": 1800.0, "attention": 300.4, "all-reduce": 250.0, "other": 80.0, "idle": 20.0}
    broken_down = {cell: {"breakdown": {"parts_us": parts_us}} for cell in ("1x512+129", "8x512+129")}
    part = measured(
        {"1x512+129": 2.45, "8x512+129": 2.4},
        breakdown=broken_down,
        exposed_communication_ms={"1x512+129": 0.3},
    )
    lines = gpu_two.verdict_lines({"parts": {"8b-nvrar": part}})
    at = next(i for i, line in enumerate(lines) if "8b-nvrar" in line and "1x512+129" in line)
    assert lines[at].startswith("MISSED") and "2.450 goal 2.35 (vLLM 3.5)" in lines[at]
    assert "GEMM 1800, attention 300, all-reduce 250, other 80, idle 20 us a step" in lines[at + 1]
    assert "exposed communication 0.300 ms" in lines[at + 1]
    assert lines[at + 2].startswith("met") and sum("GEMM" in line for line in lines) == 1


def test_what_nvrar_gains() -> None:
    document = {
        "parts": {
            "70b-nvrar": measured({"1x512+129": 17.5, "8x512+129": 18.0}),
            "70b-nccl": measured({"1x512+129": 18.6}),
            "70b-symm_mem": measured({"1x512+129": 17.25}),
        }
    }
    assert gpu_two.gain_lines(document) == [
        "70b  1x512+129   nvrar 17.500; nccl 18.600 (+1.100), symm_mem 17.250 (-0.250)"
    ]


def test_failed_and_skipped_tests_are_named() -> None:
    text = (
        '<testsuites><testsuite><testcase classname="a" name="good"/>'
        '<testcase classname="a" name="bad[1]"><failure message="no"/></testcase>'
        '<testcase classname="a" name="worse"><error message="no"/></testcase>'
        '<testcase classname="a" name="left"><skipped message="needs two GPUs"/></testcase></testsuite></testsuites>'
    )
    expected = {"tests": 4, "failed": ["a::bad[1]", "a::worse"], "skipped": 1, "why_skipped": ["needs two GPUs"]}
    assert gpu_two.junit_counts(text) == expected


def test_what_is_left_to_do() -> None:
    names = ["a", "b", "c"]
    document = {"parts": {"a": {"ok": True}, "b": {"ok": False}}}
    assert gpu_two.pending(names, document, []) == ["b", "c"]
    assert gpu_two.pending(names, document, ["c", "a"]) == ["a", "c"], "asked for, so again; in order of value"
    assert gpu_two.pending(["x-1", "x-2", "xy", "z"], {"parts": {}}, ["z", "x"]) == ["x-1", "x-2", "z"]
    with pytest.raises(SystemExit, match="no part 'd'"):
        gpu_two.pending(names, document, ["d"])


def stub(name: str, code: str, limit_s: float = 20.0, **more: Any) -> Any:
    return gpu_two.Part(name, limit_s, (sys.executable, "-c", code, "{folder}"), **more)


def test_one_failure_never_stops_the_next_and_each_is_saved() -> None:
    document: dict[str, Any] = {"parts": {}}
    saved: list[list[str]] = []
    write = "import os, sys, json; json.dump({'results': os.environ['WHERE']}, open(sys.argv[1] + '/r.json', 'w'))"
    chosen = [
        stub("fails", "print('why'); raise SystemExit(3)"),
        gpu_two.Part("missing", 20.0, ("/no/such/program",)),
        stub("hangs", "import time; print('begun', flush=True); time.sleep(60)", 2.0),
        stub("broken", "import sys; open(sys.argv[1] + '/r.json', 'w').write('{')", writes={"record": "r.json"}),
        stub("works", write, writes={"record": "r.json"}, env={"WHERE": "{folder}/x"}),
    ]
    started = time.monotonic()
    gpu_two.run_parts(chosen, document, 100.0, lambda now: saved.append(list(now["parts"])))
    assert time.monotonic() - started < 40
    found = document["parts"]
    assert [name for name, part in found.items() if part["ok"]] == ["works"]
    assert found["fails"]["error"] == "exit code 3" and found["fails"]["output"] == "why\n"
    assert "FileNotFoundError" in found["missing"]["error"]
    assert found["hangs"]["error"] == "cut off after 2 s" and "begun" in found["hangs"]["output"]
    assert "JSONDecodeError" in found["broken"]["error"]
    assert found["works"]["record"]["results"].endswith("/x") and "{folder}" not in found["works"]["record"]["results"]
    assert saved[0] == ["fails"] and saved[-1] == ["fails", "missing", "hangs", "broken", "works"]


def test_a_part_for_which_no_time_is_left_is_not_begun_and_keeps_an_earlier_figure() -> None:
    document: dict[str, Any] = {"parts": {"second": {"ok": False, "record": 7}}}
    chosen = [stub("first", "pass", 90.0), stub("second", "pass", 90.0), stub("short", "pass", 6.0)]
    gpu_two.run_parts(chosen, document, 8.0, lambda now: None)
    assert document["parts"]["first"] == {"ok": False, "error": "no time was left"}
    assert document["parts"]["second"] == {"ok": False, "record": 7}
    assert document["parts"]["short"]["ok"] is True


def test_every_goal_has_a_part_that_measures_it() -> None:
    made = gpu_two.parts()
    names = [part.name for part in made]
    assert len(set(names)) == len(names)
    assert {v.part for v in gpu_two.verdicts({"parts": {}})} <= set(names)
    tables = [part for part in made if "--table" in part.command]
    assert {part.name for part in tables} >= set(gpu_two.GOALS)
    for part in tables:
        tp, words = "--tp" in part.command, part.command
        assert tp == (part.name not in ("8b-tp1", "8b-flashinfer"))
        assert not tp or words[words.index("--all-reduce") + 1] == part.name.split("-", 1)[1]
        model = Path(words[words.index("--model") + 1])
        assert (SOURCE.parents[1] / model / "config.json").exists() and model.name.endswith(part.name.split("-")[0])
    assert all(part.limit_s < 600 for part in made)


def test_the_parts_parse_as_commands_of_yalis() -> None:
    from yalis.cli.main import build_parser

    for part in gpu_two.parts():
        words = list(part.command)
        if words[1:3] == ["-m", "yalis"]:
            build_parser(words[3]).parse_args(words[3:])


def test_the_cost_of_rules_is_told_by_batch(capsys: pytest.CaptureFixture[str]) -> None:
    found = gpu_two.sampling(str(SOURCE.parents[1] / "models" / "demo"), 1, batches=(1, 3), tokens=4)
    assert len(found) == 7 and all(set(row) == {"1", "3"} and min(row.values()) > 0 for row in found.values())
    assert "top_p, peaked" in capsys.readouterr().out


def test_resume_and_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def parts() -> list[Any]:
        return [stub("one", "pass"), stub("two", f"open({str(tmp_path / 'ran')!r}, 'a').write('2')")]

    monkeypatch.setattr(gpu_two, "parts", parts)
    monkeypatch.chdir(tmp_path)
    for name in gpu_two.QUIET:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    Path("a.json").write_text(json.dumps({"parts": {"one": {"ok": True, "record": 1}, "two": {"ok": False}}}))
    gpu_two.main(["--out", "b.json", "--resume", "a.json", "--commit", "abc"])
    assert (tmp_path / "ran").read_text() == "2"
    found = json.loads((tmp_path / "b.json").read_text())
    assert found["parts"]["one"] == {"ok": True, "record": 1} and found["parts"]["two"]["ok"] is True
    assert found["commit"] == "abc"
    assert [os.environ[name] for name in gpu_two.QUIET] == list(gpu_two.QUIET.values())
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    gpu_two.main(["--show", "b.json"])
    assert "not measured" in capsys.readouterr().out
