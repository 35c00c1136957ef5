"""``yalis demo``: four ranks as two nodes, the same text with every all-reduce, and a table that fits a terminal."""

from __future__ import annotations

import os

import pytest

from tests.support.forked import run_module
from tests.support.ranks import ROOT
from yalis.cli import demo
from yalis.errors import BuildError
from yalis.utils.native import cxx_compiler


def test_demo() -> None:
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = run_module("yalis", "demo", "--max-tokens", "4", "--cpu-threads", "1", cwd=ROOT, env=env, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].startswith("LlamaForCausalLM in float32 on ")
    assert "TP 4 x PP 1, 2 node(s) of 2 rank(s)" in lines[0]
    assert "\n> This program is free software" in done.stdout
    header = next(line.split() for line in lines if line.split()[:2] == ["TTFT", "TPOT"])
    algorithms = ["torch", "rd", *(["nvrar"] if cxx_compiler() else [])]
    names = tuple(f"{name} " for name in ("torch", "rd", "nvrar"))
    rows = {line.split()[0]: line.split()[1:] for line in lines if line.startswith(names) and line.count(".") > 5}
    assert list(rows) == algorithms
    assert ("Without nvrar: " in done.stdout) == (cxx_compiler() is None)
    for name, row in rows.items():
        values = dict(zip(header, map(float, row), strict=True))
        parts = sum(values[part] for part in ("compute", "intra", "inter", "flat", "stages", "host"))
        assert abs(parts - values["step"]) <= 0.1 * values["step"] + 0.1, values
        # Only the algorithm that knows nodes, and waits in between, can tell inside from between.
        assert (values["inter"] > 0, values["flat"] > 0) == ((True, False) if name == "rd" else (False, True))
    assert max(len(line) for line in lines if line[:2] != "> " and "|" not in line) <= 120
    assert lines[-1] == f"Same text with every algorithm: {', '.join(algorithms)}."


def test_without_a_compiler_a_sentence_says_why_nvrar_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(kind: str) -> None:
        raise BuildError("cannot build nvrar: no C++ compiler found; install g++ or set CXX\ndetails")

    monkeypatch.setattr("yalis.comm.nvrar.build.library_path", refuse)
    names, sentence = demo._algorithms(None, {"tensor_parallel_size": 4, "ranks_per_node": 2, "device": "cpu"})
    assert names == ["torch", "rd"]
    assert sentence == "Without nvrar: cannot build nvrar: no C++ compiler found; install g++ or set CXX."
    assert demo._algorithms("rd", {"tensor_parallel_size": 4}) == (["rd"], "")
