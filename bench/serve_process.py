"""A `yalis serve` of this checkout in processes of its own, for the scripts beside this file: start, watch, end."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
START_S, STOP_S = 90.0, 45.0
LAUNCHES = ("alone", "torchrun", "nodes")


@dataclass
class ServerProcess:
    """A server that answers at ``url``; ``log`` is what its processes wrote to stderr.

    Attributes:
        process: the one that was started first: ``yalis serve``, or the launcher over it.
        others: those of further nodes.
    """

    process: subprocess.Popen[bytes]
    url: str
    log: Path
    others: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def family(self) -> list[psutil.Process]:
        """All processes of the server, of all nodes."""
        found = []
        for process in (self.process, *self.others):
            with contextlib.suppress(psutil.NoSuchProcess):
                parent = psutil.Process(process.pid)
                found += [parent, *parent.children(recursive=True)]
        return found

    def get(self, path: str, timeout_s: float = 10.0) -> tuple[int, bytes]:
        """Status and body of a GET."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=timeout_s) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def state(self) -> dict[str, Any]:
        """What /state says."""
        return dict(json.loads(self.get("/state")[1]))

    def metric(self, name: str) -> float:
        """Sum of the samples of a metric."""
        lines = self.get("/metrics")[1].decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if re.match(rf"{re.escape(name)}[{{ ]", line))

    def resources(self) -> dict[str, float]:
        """Of all processes of the server: memory of their own in MiB (USS), open descriptors, threads."""
        total = {"uss_mib": 0.0, "descriptors": 0.0, "threads": 0.0}
        for process in self.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                total["uss_mib"] += process.memory_full_info().uss / 2**20
                total["descriptors"] += process.num_fds()
                total["threads"] += process.num_threads()
        return total

    def api_resources(self) -> dict[str, float]:
        """The same for the API process alone."""
        process = psutil.Process(self.process.pid)
        return {"uss_mib": process.memory_full_info().uss / 2**20, "descriptors": float(process.num_fds())}

    def wait_idle(self, timeout_s: float = 20.0) -> dict[str, Any]:
        """The state once nothing runs or waits, or at the deadline."""
        deadline = time.monotonic() + timeout_s
        state = self.state()
        while time.monotonic() < deadline:
            if not (state["running"] or state["waiting"] or state["open_requests"] or state["kv"]["usage"]):
                break
            time.sleep(0.3)
            state = self.state()
        return state


@contextlib.contextmanager
def serving(model: str, *options: str, launch: str = "alone", ranks: int = 1) -> Iterator[ServerProcess]:
    """A ready server on a free port of 127.0.0.1; ended with SIGTERM, then by force.

    Args:
        model: folder.
        options: of ``yalis serve``.
        launch: how its ranks are started: by the server ``alone``, under ``torchrun``, or as two ``nodes`` of this
            host, the second with ``--headless``.
        ranks: how many there are, for torchrun.

    Raises:
        RuntimeError: it did not become ready; carries its log.
    """
    with tempfile.TemporaryDirectory(prefix="yalis-serve-") as folder:
        log = Path(folder) / "log"
        arguments = ["serve", model, "--host", "127.0.0.1", "--port", "0", *options]
        processes: list[subprocess.Popen[bytes]] = []
        try:
            with log.open("ab") as out:
                for command in _commands(launch, ranks, arguments):
                    processes.append(
                        subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
                    )
            yield ServerProcess(processes[0], _url(processes[0], log), log, processes[1:])
        finally:
            _end(processes)


def _commands(launch: str, ranks: int, arguments: list[str]) -> list[list[str]]:
    """Command lines of the processes to start."""
    python = [sys.executable, "-m"]
    if launch == "torchrun":
        run = [*python, "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m", "yalis"]
        return [[*run, *arguments]]
    if launch == "nodes":
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        shared = [*python, "yalis", *arguments, "--nnodes", "2", "--dist-init-addr", f"127.0.0.1:{port}"]
        return [[*shared, "--node-rank", "0"], [*shared, "--node-rank", "1", "--headless"]]
    return [[*python, "yalis", *arguments]]


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    running = [process for process in processes if process.poll() is None]
    for process in running:
        process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + STOP_S
    for process in running:
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            for child in (*psutil.Process(process.pid).children(recursive=True), process):
                with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                    os.kill(child.pid, signal.SIGKILL)
            process.wait(10)


def _url(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        found = re.search(r"serving \S+ on (http://\S+)", log.read_text(errors="replace"))
        if found:
            return found[1].rstrip("/")
        time.sleep(0.1)
    raise RuntimeError(f"the server did not come up:\n{log.read_text(errors='replace')[-4000:]}")
