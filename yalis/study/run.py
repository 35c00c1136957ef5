"""Runs a study cell by cell: resumable, failures recorded and not fatal, one JSON line a cell.

Every cell is a process of its own with a time limit, and whatever it started ends with it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import psutil

from yalis.comm.emulation import VARIABLE, EmulatedFabric
from yalis.errors import ConfigError
from yalis.study.grid import Cell, Study
from yalis.study.workload import parse_workload

RESULTS = "results.jsonl"
_GRACE_S = 5.0
_POLL_S = 0.05


class Progress(Protocol):
    """Sees the cells come and go."""

    def begin(self, label: str) -> None:
        """A cell is measured from now on."""

    def end(self) -> None:
        """It has ended, or was not to be measured."""


def read_results(folder: Path) -> list[dict[str, Any]]:
    """The lines of a study's results, the last of each cell; a line that was cut short counts as not there."""
    found: dict[str, dict[str, Any]] = {}
    path = folder / RESULTS
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                entry = json.loads(line)
                found[entry["key"]] = entry
            except (ValueError, KeyError):
                continue
    return list(found.values())


def record_path(folder: Path, cell: Cell) -> Path:
    """Where the record of a cell is written."""
    return folder / "records" / f"{cell.key}.json"


def take_in(study: Study, folder: Path) -> int:
    """Make lines of the records that job scripts or an interrupted run left; returns how many cells are measured."""
    done = {e["key"]: e["status"] for e in read_results(folder)}
    for cell in study.cells:
        path = record_path(folder, cell)
        if done.get(cell.key) != "ok" and path.exists():
            try:
                _append(folder, study, cell, {"record": json.loads(path.read_text()), "status": "ok"})
            except ValueError:  # cut short: measured again
                path.unlink()
                continue
            done[cell.key] = "ok"
    return sum(done.get(cell.key) == "ok" for cell in study.cells)


def run_study(
    study: Study,
    folder: Path,
    *,
    retry: bool = True,
    say: Callable[[str], None] = print,
    progress: Progress | None = None,
) -> int:
    """Run what is not there yet; returns the number of failed cells. Every cell ends within ``timeout_s``.

    Args:
        folder: for the results; made if needed.
        retry: run cells again that failed before.
        say: takes a line per cell.
    """
    (folder / "records").mkdir(parents=True, exist_ok=True)
    take_in(study, folder)
    done = {e["key"]: e["status"] for e in read_results(folder)}
    failed = 0
    for number, cell in enumerate(study.cells, 1):
        where = f"[{number}/{len(study.cells)}] {cell.label}"
        status = done.get(cell.key)
        if status == "ok" or (status == "failed" and not retry):
            say(f"{where}: {status} before")
            failed += status == "failed"
        else:
            if progress is not None:
                progress.begin(cell.label)
            entry = _run_cell(cell, record_path(folder, cell), study.timeout_s)
            _append(folder, study, cell, entry)
            bad = entry["status"] == "failed"
            failed += bad
            tail = f": {entry['error'].splitlines()[-1][:160]}" if bad else ""
            say(f"{where}: {entry['status']} in {entry['seconds']:.1f} s{tail}")
        if progress is not None:
            progress.end()
    return failed


def _append(folder: Path, study: Study, cell: Cell, entry: Mapping[str, Any]) -> None:
    line = {"key": cell.key, "label": cell.label, "cell": asdict(cell), "study": study.name}
    line |= {"baseline": study.baseline, **entry}
    with (folder / RESULTS).open("a") as lines:
        lines.write(json.dumps(line) + "\n")


def _run_cell(cell: Cell, out: Path, timeout_s: float) -> dict[str, Any]:
    started = time.monotonic()
    entry: dict[str, Any] = {}
    try:
        entry |= {"record": measure(cell, out, timeout_s), "status": "ok"}
    except (ConfigError, ValueError, OSError) as error:
        entry |= {"status": "failed", "error": str(error) or type(error).__name__}
    return entry | {"seconds": round(time.monotonic() - started, 3)}


def measure(cell: Cell, out: Path, timeout_s: float) -> dict[str, Any]:
    """The record of a cell, measured now.

    Raises:
        ConfigError: it failed or took longer than ``timeout_s``; holds its last words.
    """
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "PYTHONPATH": path, **({VARIABLE: cell.emulate} if cell.emulate else {})}
    code, words = run_limited(command(cell, out), environment, timeout_s)
    if code or not out.exists():
        raise ConfigError(words or f"exit code {code} and no record")
    record: dict[str, Any] = json.loads(out.read_text())
    return record


def command(cell: Cell, out: Path) -> list[str]:
    """What measures this cell on this machine and writes its record to ``out``."""
    if cell.kind == "yalis" and not cell.load and cell.emulate and EmulatedFabric.parse(cell.emulate).namespaces:
        place = [str(cell.ranks), str(cell.ranks_per_node)]
        return [sys.executable, "-m", "yalis.study.netns", *place, *rank_command(cell, out)[2:]]
    if cell.kind == "allreduce":
        return [*rank_command(cell, out), "--ranks", str(cell.ranks)]
    return rank_command(cell, out)


def rank_command(cell: Cell, out: Path) -> list[str]:
    """The same where a launcher starts the ranks."""
    if cell.kind == "allreduce":
        found = [sys.executable, "-m", "yalis.study.allreduce_cell", "--algorithm", cell.all_reduce]
        found += ["--ranks-per-node", str(cell.ranks_per_node), "--iters", str(max(5, cell.iters))]
        return [*found, "--device", str(cell.options.get("device", "auto")), "--output-json", str(out)]
    scheme = ["--tp", str(cell.tp), "--pp", str(cell.pp)]
    engine = [*scheme, "--ranks-per-node", str(cell.ranks_per_node), "--load-format", cell.load_format]
    if cell.kind == "yalis" and cell.tp > 1:
        engine += ["--all-reduce", cell.all_reduce]
    if cell.load:
        found = [sys.executable, "-m", "yalis.study.load_cell", "--model", cell.model, "--output-json", str(out)]
        found += ["--load", json.dumps(dict(cell.load)), *_server_options(cell)]
        return found if cell.kind == "openai" else [*found, "--serve", *engine]
    work = parse_workload(cell.workload)
    shape = ["--batch-size", str(work.batch), "--input-len", str(work.input_len), "--output-len", str(work.output_len)]
    shape += ["--num-iters", str(cell.iters), "--num-iters-warmup", str(cell.warmup), "--output-json", str(out)]
    if cell.kind == "yalis":
        found = [sys.executable, "-m", "yalis", "bench", "latency", "--model", cell.model, *shape, *engine]
        return [*found, "--max-model-len", str(work.input_len + work.output_len)]
    python = str(cell.options.get("python") or sys.executable)
    found = [python, "-m", "yalis.study.peers", "--engine", cell.kind, "--model", cell.model, *shape, *scheme]
    return [*found, "--load-format", cell.load_format, *_server_options(cell)]


def _server_options(cell: Cell) -> Iterator[str]:
    for name in ("url", "served_name", "vocab"):
        if cell.options.get(name):
            yield from (f"--{name.replace('_', '-')}", str(cell.options[name]))


# ---- one process with a limit ---------------------------------------------------------------------------------------


def run_limited(argv: Sequence[str], environment: Mapping[str, str], timeout_s: float) -> tuple[int, str]:
    """Run a command; returns its exit code and its last words. What it started is gone when this returns.

    Raises:
        ConfigError: it took longer than ``timeout_s``.
    """
    # Into a file: a pipe that a stray descendant holds open would be waited for.
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        with _process(argv, environment, output) as process:
            try:
                code = process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                raise ConfigError(
                    f"took longer than timeout_s={timeout_s:g} s; allow more, or measure less. {_last_words(output)}"
                ) from None
        return code, _last_words(output)


def _last_words(output: Any) -> str:
    output.seek(0)
    return "\n".join(output.read().strip().splitlines()[-12:])


@contextmanager
def _process(argv: Sequence[str], environment: Mapping[str, str], output: Any) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        argv, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, text=True
    )
    try:
        yield process
    finally:
        end_tree(process)


def end_tree(process: subprocess.Popen[Any]) -> None:
    """End a child and all its descendants: ask it first, since it may have things to put away, then kill what is left.

    Descendants of one that has ended already by itself are its own affair.
    """
    if process.poll() is not None:
        return
    family = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    deadline = time.monotonic() + _GRACE_S
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    if process.poll() is None:
        family = [*psutil.Process(process.pid).children(recursive=True), *family]
        process.kill()
        process.wait()
    for child in family:
        try:
            child.kill()  # psutil compares start times, so a number that was given anew is safe
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family, timeout=_GRACE_S)
