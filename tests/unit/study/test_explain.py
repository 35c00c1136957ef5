"""Records explained: terms that add up, what a wait is taken from, and what changed between two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from yalis.cli.main import main
from yalis.errors import ConfigError
from yalis.study.explain import changes, decode_split, divide_computation, explain, measured_terms


def record(split: dict[str, float], tpot_ms: float, **results: Any) -> dict[str, Any]:
    summary = {"step": {"mean": tpot_ms}, "first": {"mean": 50.0}}
    engine = {"model": "m", "tensor_parallel_size": 4, "pipeline_parallel_size": 1, "num_nodes": 2, "all_reduce": "rd"}
    config = {"batch_size": 8, "input_len": 128, "output_len": 65, "engine": engine}
    return {"results": {"summary_ms": summary, "decode_split_s": split, **results}, "config": config, "env": {}}


SPLIT = {"other_s": 4e-3, "intra_s": 1e-3, "inter_s": 3e-3, "wait_s": 1e-3, "host_s": 0.8e-3}


def test_split_takes_waits_out_of_their_tier() -> None:
    times = {"compute_s": 8.0, "intra_s": 1.6, "inter_s": 3.0, "host_s": 1.0, "wait_intra_s": 5.0, "wait_inter_s": 1.0}
    split = decode_split({**times, "front_s": 0.6}, tokens=10)
    assert split["other_s"] == pytest.approx(0.8)
    assert split["host_s"] == pytest.approx(0.1 + 0.06)  # in steps, and in the front end between them
    # Gathers wait inside the node too: no more is taken than the tier has.
    assert split["intra_s"] == pytest.approx(0.0)
    assert split["inter_s"] == pytest.approx(0.3 - 0.1)
    assert split["wait_s"] == pytest.approx(0.16 + 0.1)
    assert sum(split.values()) == pytest.approx((8 + 1.6 + 3 + 1 + 0.6) / 10)


def test_what_no_clock_has_seen_is_a_term_of_its_own() -> None:
    found = explain(record(SPLIT, 10.0), "a.json")
    assert found.terms.total_s == pytest.approx(9.8e-3)
    assert found.unaccounted_share == pytest.approx(0.02)
    assert found.terms.host_s == pytest.approx(0.8e-3)
    assert ("computation", 4e-3) in found.named()
    assert sum(value for _, value in found.named()) == pytest.approx(10e-3)
    short = explain(record(SPLIT, 9.0), "a.json")  # the clock of the steps says more than the user saw
    assert short.unaccounted_share == pytest.approx(-0.8 / 9)


@pytest.mark.parametrize(("tpot_ms", "warned"), [(100.0, True), (10.0, False), (9.0, True)])
def test_terms_that_do_not_explain_the_time_are_no_quiet_success(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tpot_ms: float, warned: bool
) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps(record(SPLIT, tpot_ms)))
    assert main(["explain", str(file)]) == 0
    out = capsys.readouterr().out
    assert ("WARNING: the terms miss the measured time by" in out) == warned
    [row] = [line.split() for line in out.splitlines() if line.split()[:1] == ["unaccounted"]]
    assert float(row[1]) == pytest.approx(tpot_ms - 9.8, abs=1e-3)


def test_a_trace_divides_computation() -> None:
    parts = {"GEMM": 600.0, "attention": 100.0, "all-reduce": 500.0, "other": 200.0, "idle": 100.0}
    found = explain(record(SPLIT, 10.0, breakdown={"parts_us": parts}), "a.json")
    assert not found.together
    assert found.terms.gemm_s == pytest.approx(2.4e-3)
    assert found.terms.launch_s == pytest.approx(0.4e-3)
    assert found.terms.total_s == pytest.approx(9.8e-3)
    on_gpu = divide_computation({"other_s": 1.5e-3}, parts)  # its clock holds the all-reduce
    assert on_gpu["flat_s"] == pytest.approx(0.5e-3)
    assert sum(on_gpu.values()) == pytest.approx(1.5e-3)
    apart = divide_computation({"other_s": 1.5e-3}, parts, wait_us=200.0)
    assert (apart["flat_s"], apart["wait_s"]) == pytest.approx((0.3e-3, 0.2e-3))


def test_what_changed_is_named_first() -> None:
    before, after = explain(record(SPLIT, 10.0), "a"), explain(record({**SPLIT, "inter_s": 0.5e-3}, 7.5), "b")
    name, first, second = changes(before, after)[0]
    assert (name, first, second) == ("inter all-reduce", 3e-3, 0.5e-3)
    assert measured_terms(record(SPLIT, 10.0))["joined"] == {
        "computation": ["gemm_s", "attention_s", "launch_s", "other_s"]
    }


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    first.write_text(json.dumps(record(SPLIT, 10.0)))
    changed = record({**SPLIT, "inter_s": 0.5e-3}, 7.5)
    changed["env"] = {"YALIS_EMULATED_FABRIC": "alpha_s=0.001"}
    second.write_text(json.dumps(changed))
    assert main(["explain", str(first)]) == 0
    assert "TPOT 10.000 ms = " in capsys.readouterr().out
    assert main(["explain", str(first), str(second)]) == 0
    out = capsys.readouterr().out
    assert "mostly inter all-reduce: -2.500 ms" in out
    assert "[EMULATED network: alpha_s=0.001]" in out
    (tmp_path / "c.json").write_text("{}")
    for path, words in ((tmp_path / "c.json", "holds no split"), (tmp_path / "none", "no record")):
        assert main(["explain", str(path)]) == 1
        assert words in capsys.readouterr().err
    with pytest.raises(ConfigError, match="holds no split"):
        explain({"results": {"summary_ms": {}}}, "x")
