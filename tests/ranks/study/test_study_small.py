"""A small study from its file to its report, with real ranks, servers and job scripts."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.checkpoints import DEMO
from tests.support.forked import run_module
from tests.support.ranks import ROOT
from tests.support.server import Server
from yalis.study.run import read_results

ENGINES = f"""
name = "small"
models = ["{DEMO}"]
workloads = ["2x16+6"]
schemes = [{{ tp = 1 }}, {{ tp = 2, ranks_per_node = 1 }}]
iters = 2
timeout_s = 60
cluster = "cpu-host"
emulate = "alpha_s=0.005,bytes_per_s=2e7"
[[engine]]
kind = "yalis"
[[engine]]
kind = "transformers"
[allreduce]
nodes = [2]
algorithms = ["rd"]
"""


def yalis(*arguments: str, env: dict[str, str] | None = None) -> str:
    done = run_module("yalis", *arguments, cwd=ROOT, env=os.environ | (env or {}), timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def cells_of(folder: Path) -> dict[str, dict[str, Any]]:
    found = read_results(folder)
    assert all(e["status"] == "ok" for e in found), [e.get("error") for e in found]
    return {e["label"]: e["record"] for e in found}


@pytest.mark.timeout(300)  # four cells, each a start of its own
def test_a_small_study_and_its_report(tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text(ENGINES)
    said = yalis("study", "run", str(tmp_path / "s.toml"), "--output", str(tmp_path))
    assert "4 of 4 cells measured" in said
    records = cells_of(tmp_path)
    for record in records.values():
        assert record["argv"] and record["machine"]["versions"]["torch"] and record["machine"]["commit"]
    assert [len(r["samples"]["first_s"]) for r in records.values() if "first_s" in r["samples"]] == [2, 2, 2]
    yalis("study", "report", str(tmp_path))
    one, two, other = table(tmp_path / "cells.csv")
    assert [r["engine"] for r in (one, two, other)] == ["yalis", "yalis", "transformers"]
    assert (one["network"], two["network"]) == ("", "emulated")
    assert float(two["TPOT ms"]) > 8 * 5  # two all-reduces in each of four layers, 5 ms each
    assert two["TPOT residual %"] and not other["TPOT residual %"]
    swept = table(tmp_path / "allreduce.csv")
    small = next(r for r in swept if r["bytes"] == "1024")
    assert float(small["median us"]) > 5000 and float(small["predicted us"]) == pytest.approx(5051, abs=1)
    assert "Where a decode step goes" in (tmp_path / "report.html").read_text()


LOADS = f"""
name = "loads"
models = ["{DEMO}"]
iters = 1
timeout_s = 100
workloads = [%s]
[[engine]]
%s
"""
TRACE = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n" + "".join(
    f"{t},ChatGPT,{n},4,{n + 4},Conversation log\n" for t, n in ((5, 8), (6, 12), (7.5, 8))
)


def test_a_server_under_a_batch_and_under_arrivals(tmp_path: Path) -> None:
    with Server("--served-model-name", "theirs") as server:
        server.ready()
        engine = f'kind = "openai"\nname = "a server"\nurl = "{server.url}"\nserved_name = "theirs"'
        load = "{ rate = 20, requests = 6, input_len = 8, output_len = 4 }"
        (tmp_path / "s.toml").write_text(LOADS % (f'"2x8+4", {load}', engine))
        yalis("study", "run", str(tmp_path / "s.toml"), "--output", str(tmp_path))
    records = cells_of(tmp_path)
    assert list(records) == ["a server demo TP1, 2x8+4", "a server demo TP1, 6 of 8+4 at 20/s"]
    batch, arrivals = records.values()
    assert len(batch["samples"]["step_s"]) == 1
    assert len(arrivals["samples"]["e2e_s"]) == 6 and arrivals["results"]["tokens_per_s"] > 0


def test_a_trace_is_played_against_a_server_of_our_own(tmp_path: Path) -> None:
    (tmp_path / "trace.csv").write_text(TRACE)
    load = f'{{ trace = "{tmp_path}/trace.csv", requests = 3, time_scale = 2 }}'
    (tmp_path / "s.toml").write_text(LOADS % (load, 'kind = "yalis"'))
    yalis("study", "run", str(tmp_path / "s.toml"), "--output", str(tmp_path))
    [(label, record)] = cells_of(tmp_path).items()
    assert label == "yalis demo TP1, 3 of trace.csv, 2x faster"
    assert len(record["samples"]["first_s"]) == 3 and record["results"]["requests_per_s"] < 3 / 1.2


FAKE_SRUN = """#!{python}
import os, subprocess, sys
count = int(sys.argv[1].removeprefix("--ntasks="))
step = {{"SLURM_NTASKS": str(count), "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "7", "SLURM_STEP_NUM_NODES": str(count),
        "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_TASKS_PER_NODE": f"1(x{{count}})", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "{port}"}}
tasks = [
    subprocess.Popen(sys.argv[2:], env={{**os.environ, **step, "SLURM_PROCID": str(i), "SLURM_LOCALID": "0",
                                         "SLURM_NODEID": str(i)}})
    for i in range(count)
]
sys.exit(max(task.wait() for task in tasks))
"""


@pytest.mark.parametrize("algorithm", ["rd", "ring"])
def test_a_job_script_measures_an_all_reduce_over_real_nodes(tmp_path: Path, algorithm: str) -> None:
    """srun is played by a script; what it starts is what Slurm would start."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "srun").write_text(FAKE_SRUN.format(python=sys.executable, port=port))
    (tools / "srun").chmod(0o755)
    text = f'emulate = "alpha_s=0.005"\niters = 5\n[allreduce]\nnodes = [2]\nalgorithms = ["{algorithm}"]\n'
    (tmp_path / "s.toml").write_text(f"{text}device = 'cpu'\n")
    command = ["study", "run", str(tmp_path / "s.toml"), "--slurm", "--output", str(tmp_path)]
    yalis(*command)
    [script] = (tmp_path / "jobs").glob("*.sh")
    env = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", str(script)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 of 1 cells measured; 0 job scripts" in yalis(*command)
    yalis("study", "report", str(tmp_path))
    rows = table(tmp_path / "allreduce.csv")
    assert {(r["all-reduce"], r["ranks"], r["nodes"], r["network"]) for r in rows} == {(algorithm, "2", "2", "")}
    assert json.loads(next((tmp_path / "records").iterdir()).read_text())["config"]["emulated"] == ""
