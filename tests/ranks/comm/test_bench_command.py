"""``yalis bench allreduce`` as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from tests.support.forked import run_module
from tests.support.ranks import ROOT


def bench(*options: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return run_module("yalis", "bench", "allreduce", *options, cwd=ROOT, env=env, timeout=90)


def test_it_starts_ranks_checks_and_writes_a_record(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    done = bench(
        *("--ranks", "4", "--ranks-per-node", "2", "--algorithm", "rd,torch", "-b", "2K", "-e", "4K", "-f", "2"),
        *("-n", "3", "-w", "1", "-d", "bfloat16,float32", "--device", "cpu", "--bind-cores", "--timeout", "20"),
        *("--output-json", str(path)),
    )
    assert done.returncode == 0, done.stderr
    assert "# Out of bounds values : 0 OK" in done.stdout
    assert done.stdout.count(" rd ") == 4
    record = json.loads(path.read_text())
    assert [(row["type"], row["size"], row["algorithm"]) for row in record["results"]][:2] == [
        ("bfloat16", 2048, "rd"),
        ("bfloat16", 2048, "torch"),
    ]
    assert record["config"]["ranks_per_node"] == 2
    assert len(record["samples"]["float32/4096/rd/in_place_us"]) == 3


def test_an_impossible_algorithm_is_refused(tmp_path: Path) -> None:
    done = bench("--ranks", "2", "--ranks-per-node", "1", "--algorithm", "shm", "--device", "cpu", "-n", "1")
    assert done.returncode != 0
    assert "spans 2" in done.stderr


def test_one_rank_needs_no_launch() -> None:
    done = bench("--ranks", "1", "-e", "4K", "-n", "2", "--device", "cpu")
    assert done.returncode == 0
    assert "1 ranks" in done.stdout
