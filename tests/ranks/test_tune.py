"""``yalis tune`` as a user runs it: checked, measured, written, and followed by ``auto`` from then on."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.forked import run_module
from tests.support.ranks import ROOT
from yalis.cli.main import main
from yalis.comm.tuning import TunedTable
from yalis.utils.native import cxx_compiler

pytestmark = pytest.mark.skipif(cxx_compiler() is None, reason="no C++ compiler; install g++ or set CXX")


def yalis(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "YALIS_TUNING_DIR": str(folder)}
    return run_module("yalis", *arguments, cwd=ROOT, env=env, timeout=100)


def test_two_ranks_and_auto_follows(tmp_path: Path) -> None:
    options = ("--ranks", "2", "--device", "cpu", "-b", "2K", "-e", "8K", "-f", "4", "-n", "10")
    done = yalis(tmp_path, "tune", *options, "--against", "none", "-d", "bfloat16,float32", "--bind-cores")
    assert done.returncode == 0, done.stderr
    path = tmp_path / "all-reduce-cpu-1x2.json"
    assert f"wrote {path}" in done.stdout
    table = TunedTable.from_json(path.read_text())
    assert {dtype: [row.max_bytes for row in rows] for dtype, rows in table.rows.items()} == {
        "bfloat16": [2048, 8192],
        "float32": [2048, 8192],
    }
    assert all(row.algorithm == "nvrar" and row.plan and row.us > 0 for rows in table.rows.values() for row in rows)

    record = tmp_path / "record.json"
    bench = ("bench", "allreduce", "--ranks", "2", "--device", "cpu", "-b", "8K", "-e", "16K", "-n", "2", "-w", "1")
    assert algorithms(yalis(tmp_path, *bench, "--output-json", str(record)), record) == ["nvrar", "shm"]


def algorithms(done: subprocess.CompletedProcess[str], record: Path) -> list[str]:
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, Any]] = json.loads(record.read_text())["results"]
    return [row["algorithm"] for row in rows]


def test_four_ranks_on_two_nodes_against_others(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    options = ("--ranks", "4", "--ranks-per-node", "2", "--device", "cpu", "-b", "4K", "-e", "4K", "-n", "5")
    options += ("--hidden", "512")
    done = yalis(tmp_path, "tune", *options, "--output", str(path))
    assert done.returncode == 0, done.stderr
    table = TunedTable.from_json(path.read_text())
    [row], [norm] = table.rows["bfloat16"], table.norms["bfloat16"]
    assert norm.max_bytes == 4096 and norm.plan is not None and norm.us > 0
    assert table.plan(torch.bfloat16, 4096, norm=True) == norm.plan
    assert {row.algorithm, *row.others} == {"nvrar", "rd", "torch"}
    assert row.us <= min(row.others.values())
    assert [p.name for p in tmp_path.iterdir()] == ["table.json"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--ranks", "1"), "--ranks 1: must be at least 2"),
        (("-n", "1"), "--iters 1: must be at least 5"),
        (("--timeout", "0"), "--timeout 0"),
        (("-b", "4K", "-e", "2K"), "message sizes"),
        (("--against", "torch,nvrar"), "--against 'nvrar'"),
    ],
)
def test_impossible_options_are_refused(
    options: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tune", *options]) == 1
    assert words in capsys.readouterr().err
