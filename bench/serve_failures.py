"""How fast a server tells the truth when a rank dies or stalls.

Every rank in turn is killed (kill -9) or stopped (kill -STOP), while requests run and while the server is idle.
Measured are the seconds until /health says 503, until a request that was under way has its 503, until an open stream
has its error event, and until the server's process and all of its ranks are gone; its exit code; and whether the 503
named the right rank.

    python bench/serve_failures.py --tp 1 2 --rounds 3 --output docs/results/data/serve-failures.json
    python bench/serve_failures.py --tp 2 --pp 2 --launch nodes [--output FILE]

``--launch`` says how the ranks are started: by the server alone, under torchrun, or as two nodes of this host without a
launcher. Under torchrun the exit code is torchrun's own, and a stopped rank is only gone when torchrun kills it.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
from serve_process import LAUNCHES, ROOT, ServerProcess, serving

from yalis.utils.machine import machine_record

SIGNALS = {"kill -9": signal.SIGKILL, "kill -STOP": signal.SIGSTOP}
_POLL_S = 0.01
_EXIT_S = 90.0
_BODY = {"prompt": "This program", "max_tokens": 900, "ignore_eos": True}


def send(server: ServerProcess, body: dict[str, Any]) -> http.client.HTTPResponse:
    """Send a completion; the response may still be under way."""
    address = urlsplit(server.url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=120)
    connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    return connection.getresponse()


class Requests:
    """One whole answer and one stream under way, and when each ended."""

    def __init__(self, server: ServerProcess):
        self._server = server
        self.ended: dict[str, float] = {}
        self.status = 0
        self.error_event = False
        self._running = threading.Event()
        self._threads = [threading.Thread(target=self._whole), threading.Thread(target=self._stream)]
        for thread in self._threads:
            thread.start()
        self._running.wait(30)
        time.sleep(0.3)

    def _whole(self) -> None:
        response = send(self._server, {**_BODY, "n": 8})
        response.read()
        self.status = response.status
        self.ended["request"] = time.monotonic()

    def _stream(self) -> None:
        response = send(self._server, {**_BODY, "n": 8, "stream": True})
        last = b""
        for line in response:
            if line.startswith(b"data: "):
                last = line
                self._running.set()
        self.error_event = last.startswith(b'data: {"error"')
        self.ended["stream"] = time.monotonic()

    def join(self) -> None:
        """Wait for both."""
        for thread in self._threads:
            thread.join(120)


@dataclass(frozen=True)
class Case:
    """One loss: of which rank of which layout, how, and under which load."""

    tp: int
    pp: int
    rank: int
    signal: str
    busy: bool

    def __str__(self) -> str:
        return f"{self.tp} x {self.pp} | {self.rank} | {self.signal} | {'busy' if self.busy else 'idle'}"


def one_loss(model: str, case: Case, launch: str, timeout_s: float) -> dict[str, Any]:
    """Start a server, take one rank away, and watch."""
    ranks = case.tp * case.pp
    options = ["-tp", str(case.tp), "-pp", str(case.pp), "--cpu-threads", "1", "--dist-timeout", f"{timeout_s:g}"]
    with serving(model, *options, launch=launch, ranks=ranks) as server:
        family = server.family()
        pid = rank_pid(server, case.rank)
        requests = Requests(server) if case.busy else None
        os.kill(pid, SIGNALS[case.signal])
        lost = time.monotonic()
        message, noticed = "", None
        while noticed is None and time.monotonic() < lost + 3 * timeout_s:
            try:
                status, body = server.get("/health", timeout_s=timeout_s)
            except OSError:
                break
            if status == 503:
                noticed, message = time.monotonic() - lost, json.loads(body)["error"]["message"]
            time.sleep(_POLL_S)
        result: dict[str, Any] = {
            **asdict(case),
            "launch": launch,
            "health_s": noticed,
            "named": message.startswith(f"rank {case.rank} on {socket.gethostname()} (pid {pid}) was lost: "),
            "message": message,
        }
        if requests is not None:
            requests.join()
            result |= {f"{what}_s": at - lost for what, at in requests.ended.items()}
            result |= {"request_status": requests.status, "error_event": requests.error_event}
        deadline = lost + _EXIT_S
        codes = [exit_code(process, deadline) for process in (server.process, *server.others)]
        while any(is_alive(p) for p in family) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        result["exit_codes"] = codes
        result["exit_s"] = None if any(is_alive(p) for p in family) else time.monotonic() - lost
        return result


def rank_pid(server: ServerProcess, rank: int) -> int:
    """Process id of a rank, once a status tells.

    Raises:
        RuntimeError: none did.
    """
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        for entry in server.state()["ranks"]:
            if entry["rank"] == rank:
                return int(entry["pid"])
        time.sleep(_POLL_S)
    raise RuntimeError(f"/state tells nothing of rank {rank}")


def is_alive(process: psutil.Process) -> bool:
    """Whether it runs (a zombie does not)."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def exit_code(process: subprocess.Popen[bytes], deadline: float) -> int | None:
    """None: it still ran at the deadline."""
    try:
        return process.wait(max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return None


def as_promised(sample: dict[str, Any], timeout_s: float) -> bool:
    """Noticed in time, the right rank named, everybody told, everything gone, and an exit code for a supervisor."""
    in_time = sample["named"] and sample["health_s"] is not None and sample["health_s"] <= timeout_s
    if sample["launch"] == "torchrun" and not sample["busy"] and sample["health_s"] is None:
        # torchrun ends the others as soon as one is gone, and an idle server has nothing to wait for.
        in_time = sample["exit_s"] is not None and sample["exit_s"] <= timeout_s
    told = not sample["busy"] or (sample["request_status"] == 503 and sample["error_event"])
    expected = (1,) if sample["launch"] == "torchrun" else (70,)
    ended = sample["exit_s"] is not None and all(code in expected for code in sample["exit_codes"])
    return bool(in_time and told and ended)


def main() -> int:
    """Run all cases; 1 if one of them broke a promise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "models" / "demo"))
    parser.add_argument("--tp", "--ranks", type=int, nargs="+", default=[1, 2], help="one layout each (default: 1 2)")
    parser.add_argument("--pp", type=int, default=1, help="pipeline stages of all layouts (default: 1)")
    parser.add_argument("--launch", choices=LAUNCHES, default="alone")
    parser.add_argument("--lose", type=int, nargs="+", metavar="RANK", help="ranks to lose (default: each in turn)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--timeout", type=float, default=4.0, help="--distributed-timeout-seconds (default: 4)")
    parser.add_argument("--output", type=Path, help="JSON file for the raw samples")
    args = parser.parse_args()
    cases = [
        Case(tp, args.pp, rank, name, busy)
        for tp in args.tp
        for rank in range(tp * args.pp)
        if args.lose is None or rank in args.lose
        for name in SIGNALS
        for busy in (True, False)
    ]
    samples: dict[Case, list[dict[str, Any]]] = {case: [] for case in cases}
    for _ in range(args.rounds):
        for case in cases:
            sample = one_loss(args.model, case, args.launch, args.timeout)
            samples[case].append(sample)
            print(f"{args.launch} | {case}: {sample}", file=sys.stderr, flush=True)
    print(f"Ranks started: {args.launch}\n")
    print(
        "| tp x pp | lost | signal | load | /health 503, s | request 503, s | stream error, s | all gone, s | exit |\n"
        "|---|---|---|---|---|---|---|---|---|"
    )
    for case, mine in samples.items():
        spans = (
            "-" if what in ("request", "stream") and not case.busy else span([s.get(f"{what}_s") for s in mine])
            for what in ("health", "request", "stream", "exit")
        )
        codes = sorted({str(s["exit_codes"]) for s in mine})
        print(f"| {case} | {' | '.join(spans)} | {', '.join(codes)} |")
    flat = [sample for mine in samples.values() for sample in mine]
    broken = sum(not as_promised(sample, args.timeout) for sample in flat)
    print(f"\n{len(flat)} losses, {broken} of them not as promised")
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
        record = {"command": sys.argv, "commit": commit, "machine": machine_record(), "samples": flat}
        args.output.write_text(json.dumps(record, indent=1) + "\n")
    return 1 if broken else 0


def span(values: list[float | None]) -> str:
    known = sorted(v for v in values if v is not None)
    if len(known) < len(values):
        return "none" if not known else f"missing in {len(values) - len(known)} of {len(values)}"
    return f"{statistics.median(known):.2f} [{known[0]:.2f} .. {known[-1]:.2f}]"


if __name__ == "__main__":
    sys.exit(main())
