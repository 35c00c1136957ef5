"""Running a study: resumption, failures, limits, progress; job scripts and their submission."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.ranks import ROOT
from tests.support.sse_server import sse_server
from tests.unit.study.test_grid import TEXT, load
from yalis.cli.main import main
from yalis.errors import ConfigError
from yalis.study import peers, run
from yalis.study.grid import Cell, Study
from yalis.study.run import read_results, record_path, run_limited, run_study
from yalis.study.slurm import on_slurm, submit, write_scripts


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return load(tmp_path)


def test_a_study_resumes_and_keeps_going_past_failures(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def measure(cell: Cell, out: Path, timeout_s: float) -> dict[str, Any]:
        calls.append(cell.key)
        if cell.pp == 2:
            raise ConfigError("no such thing\nrank 1 said so")
        return {"results": {}}

    monkeypatch.setattr(run, "measure", measure)
    said: list[str] = []
    assert run_study(study, tmp_path, say=said.append) == 2
    assert len(calls) == len(study.cells)
    assert sum("failed in" in line and "rank 1 said so" in line for line in said) == 2
    entries = read_results(tmp_path)
    assert {e["status"] for e in entries} == {"ok", "failed"}
    assert Cell(**entries[0]["cell"]) == study.cells[0]
    calls.clear()
    assert run_study(study, tmp_path, retry=False, say=said.append) == 2
    assert calls == []
    run_study(study, tmp_path, say=said.append)
    assert len(calls) == 2  # only those that failed
    with (tmp_path / run.RESULTS).open("a") as lines:
        lines.write('{"key": "cut sho')
    assert len(read_results(tmp_path)) == len(study.cells)


def test_a_cell_that_takes_too_long_ends_with_all_it_started(tmp_path: Path) -> None:
    """A child that ignores SIGTERM has a grandchild in a session of its own, as ranks are."""
    pids = tmp_path / "pids"
    script = (
        "import os, signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], start_new_session=True)\n"
        f"open({str(pids)!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}')\n"
        "print('loading the model', flush=True)\n"
        "time.sleep(60)\n"
    )
    started = time.monotonic()
    with pytest.raises(ConfigError, match=r"took longer than timeout_s=2 s; .* loading the model"):
        run_limited([sys.executable, "-c", script], os.environ, 2.0)
    assert time.monotonic() - started < 20
    for pid in map(int, pids.read_text().split()):
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_last_words_of_a_cell_that_fails() -> None:
    code, words = run_limited([sys.executable, "-c", "print('a'); raise SystemExit('no memory')"], os.environ, 30.0)
    assert (code, words.splitlines()[-1]) == (1, "no memory")


def test_servers_are_measured_by_the_tokens_they_count(tmp_path: Path) -> None:
    def ask(model: str) -> dict[str, Any]:
        out = tmp_path / f"{model}.json"
        options = ["--engine", "openai", "--model", model, "--url", server.url, "--vocab", "50", "--num-iters", "1"]
        options += ["--batch-size", "2", "--input-len", "3", "--output-len", "4", "--output-json", str(out)]
        peers.main([*options, "--num-iters-warmup", "0"])
        found: dict[str, Any] = json.loads(out.read_text())
        return found

    with sse_server() as server:
        record = ask("timed")
        assert len(record["samples"]["first_s"]) == len(record["samples"]["step_s"]) == 1
        assert all(len(body["prompt"]) == 3 and body["ignore_eos"] for body in server.requests)
        # A server that ends early would look fast.
        with pytest.raises(ConfigError, match="gave 2 of 4 tokens; the times would mean nothing"):
            ask("early")
        with pytest.raises(ConfigError, match="tells no usage"):
            ask("untold")
        with pytest.raises(ConfigError, match="a request failed: http_429: the queue is full"):
            ask("busy")


SERVED = """
name = "served"
models = ["timed"]
workloads = ["1x3+2", "2x3+2"]
iters = 1
[[engine]]
kind = "openai"
url = "{url}"
vocab = 50
"""


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(tmp_path: Path, terminal: bool) -> None:
    with sse_server() as server:
        (tmp_path / "s.toml").write_text(SERVED.format(url=server.url))
        command = [sys.executable, "-m", "yalis", "study", "run", str(tmp_path / "s.toml"), "--output", str(tmp_path)]
        ours, theirs = os.openpty() if terminal else os.pipe()
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=theirs,
            text=True,
            env=os.environ | {"TERM": "xterm", "COLUMNS": "100", "LINES": "24"},
        )
        os.close(theirs)
        seen: list[bytes] = []
        reader = threading.Thread(target=lambda: seen.extend(iter(lambda: _read(ours), b"")))
        reader.start()
        out, _ = process.communicate(timeout=100)
        reader.join(10)
        os.close(ours)
    text = b"".join(seen).decode()
    assert process.returncode == 0, out + text
    assert re.findall(r"\[(\d)/2\] openai timed TP1, \dx3\+2: ok in", out) == ["1", "2"]
    counts = [int(count) for count in re.findall(r"(\d)/2", text)]
    if terminal:
        assert counts == sorted(counts) and counts[-1] == 2 and "openai timed TP1, 2x3+2" in text
    else:
        assert text == ""


def _read(stream: int) -> bytes:
    """What the other end of a pseudo-terminal wrote; empty once it is closed."""
    try:
        return os.read(stream, 4096)
    except OSError:
        return b""


# ---- Slurm ----------------------------------------------------------------------------------------------------------


def test_job_scripts_name_real_nodes_and_one_srun_line(tmp_path: Path) -> None:
    text = TEXT.replace('kind = "transformers"', 'kind = "vllm"') + '\n[[engine]]\nkind = "openai"\nurl = "http://x"\n'
    study = on_slurm(load(tmp_path, text))
    assert not any(cell.emulate for cell in study.cells)  # the network is real there
    scripts = {script.stem: script.read_text() for script in write_scripts(study, tmp_path)}
    assert len(scripts) == len(study.cells)
    assert all(script.count("srun ") == 1 for script in scripts.values())

    def script_of(kind: str, **wanted: int) -> str:
        return next(
            scripts[c.key] for c in study.cells if c.kind == kind and all(getattr(c, k) == v for k, v in wanted.items())
        )

    words = ("--nodes=2", "--ntasks-per-node=1", "--partition=gpu", "--time=00:10:00", "--tp 2", "--all-reduce rd")
    assert all(word in script_of("yalis", tp=2) for word in words)
    # vllm starts its own workers.
    assert "srun --ntasks=1 " in script_of("vllm", pp=2) and "--ntasks-per-node=1" in script_of("vllm", pp=2)
    assert "srun --ntasks=1 " in script_of("openai") and "--url http://x" in script_of("openai")
    assert "srun --ntasks=8 " in script_of("allreduce", tp=8)


def test_records_of_job_scripts_are_taken_in_and_their_scripts_not_written_again(tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text(TEXT)
    command = ["study", "run", str(tmp_path / "s.toml"), "--slurm", "--output", str(tmp_path)]
    assert main(command) == 0
    cell = next(c for c in on_slurm(load(tmp_path)).cells if c.tp == 2 and c.kind == "yalis")
    script = tmp_path / "jobs" / f"{cell.key}.sh"
    script.unlink()
    record_path(tmp_path, cell).write_text(json.dumps({"results": {"from": "slurm"}}))
    cut = record_path(tmp_path, next(c for c in on_slurm(load(tmp_path)).cells if c.tp == 1))
    cut.write_text('{"cut sho')
    assert main(command) == 0
    found = {e["key"]: e for e in read_results(tmp_path)}
    assert found[cell.key]["record"]["results"] == {"from": "slurm"} and list(found) == [cell.key]
    assert not script.exists() and not cut.exists()


def test_submission_hands_every_script_to_sbatch_once(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    with pytest.raises(ConfigError, match="sbatch is not on PATH: run this on a login node"):
        submit([])
    log = tmp_path / "log"
    fake = f'#!/bin/bash\necho "$@" >> {log}\n[ -n "$REFUSE" ] && echo "invalid partition" >&2 && exit 1\n'
    (tools / "sbatch").write_text(fake + f'echo "$(wc -l < {log});cluster"\n')
    (tools / "sbatch").chmod(0o755)
    monkeypatch.setenv("REFUSE", "1")
    command = ["study", "run", str(tmp_path / "s.toml"), "--submit", "--output", str(tmp_path)]
    assert main(command) == 1
    assert "refused: invalid partition; see [slurm]" in capsys.readouterr().err
    monkeypatch.delenv("REFUSE")
    log.unlink()
    assert main(command) == 0
    assert "job 1: " in capsys.readouterr().out
    cells = on_slurm(study).cells
    handed = [line.split() for line in log.read_text().splitlines()]
    assert [words[0] for words in handed] == ["--parsable"] * len(cells)
    assert {Path(words[1]).stem for words in handed} == {cell.key for cell in cells}
    assert main(command) == 0
    assert f"{len(cells)} were submitted before" in capsys.readouterr().out
    assert len(log.read_text().splitlines()) == len(cells)


def test_cells_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "s.toml").write_text(TEXT)
    assert main(["study", "run", str(tmp_path / "s.toml"), "--list"]) == 0
    captured = capsys.readouterr()
    assert "all-reduce ring, 8 ranks on 8 node(s)" in captured.out
    assert "left out: " in captured.err
