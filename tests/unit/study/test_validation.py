"""bench/validate_plan.py: what its page says of predictions and measurements, and that it wants a quiet machine."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from yalis.bench.latency import DECODE_SHAPES
from yalis.cli import bench_latency
from yalis.cli.engine_options import engine_options
from yalis.errors import ConfigError

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("validate_plan", ROOT / "bench/validate_plan.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def _predicted(tp: int, batch: int, ttft_s: float, tpot_s: float) -> dict[str, Any]:
    terms = {"gemm_s": 0.8 * tpot_s, "launch_s": 0.15 * tpot_s, "host_s": 0.05 * tpot_s}
    return {"tp": tp, "pp": 1, "batch": batch, "ttft_s": ttft_s, "tpot_s": tpot_s, "tpot_terms_s": terms}


def _round(ttft_s: float, tpot_s: float) -> dict[str, Any]:
    seen = {"read_gb_per_s": 60.0, "load": 1.2, "steal_percent": 0.5, "others_cores": 0.1}
    return {**seen, "ttft_s": [ttft_s, ttft_s], "tpot_s": [tpot_s, tpot_s]}


def _record(bench: ModuleType, measured: dict[str, Any]) -> dict[str, Any]:
    predicted = {f"some TP{tp} PP1 batch 1": _predicted(tp, 1, 0.050, 0.010) for tp in (1, 2)}
    machine = {"cpu": {"cores_usable": 2, "model": "a CPU"}, "commit": "abc"}
    record = {
        "device": "cpu",
        "rounds": 2,
        "iters": 2,
        "calibrated": "today",
        "machine": machine,
        "predicted": predicted,
    }
    return {**record, "measured": measured, "cells": bench.cells_of(predicted, measured)}


def test_means_over_rounds_decide(bench: ModuleType) -> None:
    rounds = {
        "some TP1 PP1 batch 1": [_round(0.045, 0.010), _round(0.055, 0.012)],
        "some TP2 PP1 batch 1": [_round(0.050, 0.009), _round(0.050, 0.009)],
    }
    record = _record(bench, rounds)
    cell = record["cells"]["some TP1 PP1 batch 1"]["tpot_s"]
    assert cell["measured"] == pytest.approx(0.011)
    assert cell["error"] == pytest.approx(-1 / 11)
    assert (cell["least"], cell["most"]) == (0.010, 0.012)
    text = bench.page(record, "data")
    assert (
        "| some TP1 PP1 batch 1 | 50.00 | 50.00 | 45.00 to 55.00 | +0% | 10.00 | 11.00 | 10.00 to 12.00 | -9% |" in text
    )
    assert "**TPOT**: mean absolute error 10%, worst +11% (some TP2 PP1 batch 1)" in text
    assert text.count("goal (15 and 30) met") == 2
    assert "| TP1 PP1 batch 1 | +0% | -9% | gemm 80%, launch 15%, host 5% |" in text


def test_a_cell_that_failed_misses_the_goal_and_is_named(bench: ModuleType) -> None:
    failed = {"read_gb_per_s": 60.0, "load": 1.2, "steal_percent": 0.5, "others_cores": 0.1, "error": "no\nmemory"}
    rounds = {"some TP1 PP1 batch 1": [_round(0.05, 0.01)], "some TP2 PP1 batch 1": [failed]}
    text = bench.page(_record(bench, rounds), "data")
    assert "| some TP2 PP1 batch 1 | failed: memory |" in text
    assert text.count("goal (15 and 30) missed") == 2


def test_a_busy_machine_is_refused(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (3.0, 3.0, 3.0))
    with pytest.raises(ConfigError, match=r"load 3.00 is above 0.5 for 0 s: .*--max-load"):
        bench.wait_for_quiet(0.5, 0.0)
    bench.wait_for_quiet(4.0, 0.0)


def test_gpus_are_predicted_by_all_reduce_and_measured_a_layout_at_a_time(bench: ModuleType) -> None:
    grid = bench.GRIDS["cuda"]
    predicted = bench.predictions("2xh100", grid, "", ("nccl", "nvrar"))
    assert bench.together(predicted, "cuda") == [
        [f"llama-3.1-{place} batch {batch}" for batch in (1, 8, 32)]
        for place in (
            "8b TP1 PP1", "8b TP2 PP1 nccl", "8b TP2 PP1 nvrar", "70b TP2 PP1 nccl", "70b TP2 PP1 nvrar"
        )
    ]  # fmt: skip
    assert len(bench.predictions("2xh100", grid, "8b TP2")) == 3
    # The requests must be rows of the table that measures them.
    names = {shape.name for shape in DECODE_SHAPES}
    assert {f"{b}x{grid.input_len}+{grid.output_len}" for b in grid.batches} == names
    measured = {name: [_round(0.03, 0.004)] for name in predicted}
    record = {"device": "cuda", "rounds": 1, "iters": 3, "calibrated": "today", "predicted": predicted}
    machine = {"cpu": {"cores_usable": 32, "model": "a CPU"}, "commit": "abc", "gpus": [{"name": "H100"}] * 2}
    record |= {"machine": machine, "measured": measured, "cells": bench.cells_of(predicted, measured)}
    text = bench.page(record, "docs/results/data")
    assert "H100, H100, commit abc" in text
    assert "yalis calibrate --device cuda --output docs/results/data/plan-validation-calibrated.toml" in text
    assert "| TP2 PP1 nvrar batch 32 |" in text


def test_one_engine_measures_all_batches_of_a_table(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = []

    def run(command: list[str], **_: Any) -> None:
        commands.append(command)
        samples = {f"{b}x512+129.{kind}_s": [b * 1.0] for b in (1, 8, 32) for kind in ("first", "step")}
        Path(command[command.index("--output-json") + 1]).write_text(json.dumps({"samples": samples}))

    monkeypatch.setattr(bench.subprocess, "run", run)
    predicted = bench.predictions("2xh100", bench.GRIDS["cuda"], "8b TP2", ("nccl",))
    found = bench.measure(predicted, list(predicted), "cuda", 3, 60.0)
    assert found["llama-3.1-8b TP2 PP1 nccl batch 8"] == {"ttft_s": [8.0], "tpot_s": [8.0]}
    (command,) = commands
    # What is asked for must be options of the command.
    parser = argparse.ArgumentParser()
    bench_latency.add_arguments(parser)
    args = parser.parse_args(command[command.index("latency") + 1 :])
    assert (args.table, args.num_iters) == (True, 3)
    options = engine_options(args)
    assert (options["all_reduce"], options["tensor_parallel_size"], options["device"]) == ("nccl", 2, "cuda")


def test_cells_of_a_cpu_are_measured_with_the_all_reduce_of_their_prediction(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = []

    def run(command: list[str], **_: Any) -> None:
        commands.append(command)
        Path(command[command.index("--output-json") + 1]).write_text('{"samples": {"first_s": [1.0], "step_s": [2.0]}}')

    monkeypatch.setattr(bench.subprocess, "run", run)
    for option in ("rd", "auto"):
        cell = {"cell": {"model": "m", "tp": 2, "pp": 1, "batch": 8, "option": option}}
        assert bench.measure(cell, ["cell"], "cpu", 3, 60.0) == {"cell": {"ttft_s": [1.0], "tpot_s": [2.0]}}
        assert commands[-1][commands[-1].index("--all-reduce") + 1] == option
