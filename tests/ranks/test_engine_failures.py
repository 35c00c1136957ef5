"""A rank of a running engine dies or stalls: the caller is told who, in time, and nothing is left behind."""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import pytest

from tests.support.checkpoints import DEMO
from tests.support.forked import start_module
from tests.support.ranks import ROOT

TIMEOUT_S = 3.0
# Where a test waits the whole deadline out, several times over.
SHORT_S = 2.0
# For Python to unwind, the launcher to notice and the caller's process to be scheduled on a busy machine.
SLACK_S = 2.0
END_S = 4.0
KILL, STOP = signal.SIGKILL, signal.SIGSTOP

TP2 = {"tensor_parallel_size": 2, "distributed_timeout_s": TIMEOUT_S, "cpu_threads": 1}
TP2_PP2 = TP2 | {"pipeline_parallel_size": 2, "ranks_per_node": 2}
SHORT = {"distributed_timeout_s": SHORT_S}


def wait_for(condition: Callable[[], Any], timeout_s: float, what: str) -> Any:
    """The first true value of ``condition``; AssertionError after ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s} s"
        time.sleep(0.01)
    return value


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Program:
    """``python -m words`` and its ranks, its temporary files in a folder of their own; killed on the way out."""

    def __init__(self, *words: str, env: dict[str, str] | None = None):
        self.temporary = Path(tempfile.mkdtemp(prefix="y-", dir="/tmp"))  # short: a socket's path has 107 characters
        self.shared_before = shared_names()
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        whole = os.environ | {"TMPDIR": str(self.temporary), "OMP_NUM_THREADS": "1"} | (env or {})
        self.process = start_module(words, cwd=ROOT, env=whole, **pipes)
        self.pids: dict[int, int] = {}
        self.lines: queue.Queue[str] = queue.Queue()
        self.stderr = ""
        self._readers = [threading.Thread(target=self._read_out), threading.Thread(target=self._read_err)]
        for reader in self._readers:
            reader.start()

    def _read_out(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)

    def _read_err(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.stderr += line

    def __enter__(self) -> Program:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        for pid in [*self.pids.values(), self.process.pid]:
            if alive(pid):
                os.kill(pid, KILL)
        self.process.wait(10)
        for reader in self._readers:
            reader.join(10)
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()
        if value is not None:
            sys.stderr.write(f"--- stderr of the program:\n{self.stderr}\n")

    def find_ranks(self, count: int) -> dict[int, int]:
        """Process id by rank, as soon as ``count`` of them were started."""

        def found() -> bool:
            for child in psutil.Process(self.process.pid).children(recursive=True):
                try:
                    env = child.environ()
                except psutil.Error:
                    continue
                if "RANK" in env and env.get("TMPDIR") == str(self.temporary):
                    self.pids[int(env["RANK"])] = child.pid
            return len(self.pids) == count

        wait_for(found, 30, f"{count} ranks")
        return self.pids

    def tell(self, command: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()

    def hear(self, event: str, timeout_s: float = 30.0) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(self.lines.get(timeout=timeout_s))
        assert message["event"] == event, message
        return message

    def wait_gone(self, timeout_s: float) -> None:
        """Every rank's process has ended."""
        wait_for(lambda: not any(alive(pid) for pid in self.pids.values()), timeout_s, f"end of ranks {self.pids}")

    def left_behind(self) -> set[str]:
        """Files of ours in /dev/shm and in the folder of temporary files."""
        return (shared_names() - self.shared_before) | {p.name for p in self.temporary.iterdir()}


def shared_names() -> set[str]:
    return {p.name for p in Path("/dev/shm").glob("yalis-*")}


def started(options: dict[str, Any]) -> Program:
    return Program("tests.support.engine_driver", json.dumps(options))


def ready(program: Program, options: dict[str, Any]) -> None:
    program.hear("ready")
    program.find_ranks(options["tensor_parallel_size"] * options.get("pipeline_parallel_size", 1))


def check_named(message: str, rank: int, pid: int, number: signal.Signals) -> None:
    assert message.startswith(f"rank {rank} on {socket.gethostname()} (pid {pid}) was lost: "), message
    assert ("process died" if number == KILL else "silent for ") in message, message
    assert message.count("\n") == 0, message


LOSSES = [
    (TP2, 0, KILL),
    (TP2, 1, KILL),
    (TP2, 0, STOP),
    (TP2, 1, STOP),
    (TP2_PP2, 2, STOP),
    (TP2_PP2, 3, KILL),
]


def loss_name(value: Any) -> str:
    if isinstance(value, dict):
        return f"tp{value['tensor_parallel_size']}pp{value.get('pipeline_parallel_size', 1)}"
    return value.name if isinstance(value, signal.Signals) else f"rank{value}"


@pytest.mark.parametrize(("options", "rank", "number"), LOSSES, ids=loss_name)
def test_rank_lost_while_generating(options: dict[str, Any], rank: int, number: signal.Signals) -> None:
    with started(options) as program:
        ready(program, options)
        program.tell("generate")
        program.hear("running")
        lost = time.monotonic()
        os.kill(program.pids[rank], number)
        error = program.hear("error", TIMEOUT_S + SLACK_S)
        print(f"{loss_name(options)} rank {rank} {number.name}: {time.monotonic() - lost:.2f} s: {error['message']}")
        assert error["type"] == "EngineDeadError"
        check_named(error["message"], rank, program.pids[rank], number)
        # What was waited for: the survivor that speaks was inside a collective or a hand-over, at a step.
        assert "This rank " in error["message"]
        assert " was waiting in " in error["message"]
        assert " at step " in error["message"]
        program.wait_gone(END_S)
        assert program.left_behind() == set()
        # The error stays one: it does not become a hang or another exception.
        program.tell("generate")
        assert error["message"] in program.hear("error", 1.0)["message"]


@pytest.mark.parametrize(("rank", "number"), [(0, STOP), (1, KILL)], ids=loss_name)
def test_rank_lost_while_idle(rank: int, number: signal.Signals) -> None:
    with started(TP2) as program:
        ready(program, TP2)
        lost = time.monotonic()
        os.kill(program.pids[rank], number)
        # Nobody asks, and still the run ends.
        program.wait_gone(TIMEOUT_S + SLACK_S)
        print(f"idle, rank {rank} {number.name}: gone after {time.monotonic() - lost:.2f} s")
        program.tell("generate")
        error = program.hear("error", 1.0)
        print(error["message"])
        assert error["type"] == "EngineDeadError"
        check_named(error["message"], rank, program.pids[rank], number)
        assert program.left_behind() == set()


@pytest.mark.parametrize(("rank", "number"), [(0, KILL), (1, STOP)], ids=loss_name)
def test_rank_lost_before_the_ranks_have_met(rank: int, number: signal.Signals) -> None:
    with started(TP2) as program:
        program.find_ranks(2)
        lost = time.monotonic()
        os.kill(program.pids[rank], number)
        # The others give up TIMEOUT_S after they came, which takes them as long as Python and torch take to start.
        error = program.hear("error", TIMEOUT_S + SLACK_S + 10)
        print(f"starting, rank {rank} {number.name}: {time.monotonic() - lost:.2f} s: {error['message']}")
        assert f"rank {rank}" in error["message"]
        program.wait_gone(END_S)
        assert program.left_behind() == set()


@pytest.mark.parametrize(("rank", "number"), [(0, STOP), (1, KILL)], ids=loss_name)
def test_rank_lost_while_loading(rank: int, number: signal.Signals) -> None:
    # The ranks say at INFO when they have met; then they load weights and make the KV cache.
    with Program("tests.support.engine_driver", json.dumps(TP2), env={"YALIS_LOG_LEVEL": "INFO"}) as program:
        program.find_ranks(2)
        wait_for(lambda: "attention backend" in program.stderr, 30, "the start of loading")
        lost = time.monotonic()
        os.kill(program.pids[rank], number)
        error = hear_error_after_start(program)
        print(f"loading, rank {rank} {number.name}: {time.monotonic() - lost:.2f} s: {error['message']}")
        check_named(error["message"], rank, program.pids[rank], number)
        program.wait_gone(END_S)
        assert program.left_behind() == set()


def slow_loading(seconds: float) -> dict[str, str]:
    return {"PYTHONPATH": "tests/support/slow", "YALIS_TEST_SLOW_S": str(seconds)}


@pytest.mark.parametrize("options", [TP2 | SHORT, TP2_PP2 | SHORT], ids=["tp2", "tp2pp2"])
def test_a_rank_that_loads_longer_than_the_deadline_is_waited_for(options: dict[str, Any]) -> None:
    env = slow_loading(2 * SHORT_S)
    with Program("tests.support.engine_driver", json.dumps(options), env=env) as program:
        program.hear("ready", 60.0)
        assert "loading slowly" in program.stderr
        program.tell("stats")
        program.hear("done")


@pytest.mark.parametrize("number", [KILL, STOP], ids=loss_name)
def test_rank_lost_while_the_others_wait_for_its_loading(number: signal.Signals) -> None:
    with Program("tests.support.engine_driver", json.dumps(TP2 | SHORT), env=slow_loading(60.0)) as program:
        program.find_ranks(2)
        wait_for(lambda: "loading slowly" in program.stderr, 60, "the start of loading")
        time.sleep(SHORT_S + 1.0)  # rank 0 has loaded, and waits for longer than the deadline
        lost = time.monotonic()
        os.kill(program.pids[1], number)
        error = program.hear("error", SHORT_S + SLACK_S)
        print(f"waited for, rank 1 {number.name}: {time.monotonic() - lost:.2f} s: {error['message']}")
        check_named(error["message"], 1, program.pids[1], number)
        assert "waiting for all ranks (weights)" in error["message"]
        program.wait_gone(END_S)
        assert program.left_behind() == set()


def hear_error_after_start(program: Program) -> dict[str, Any]:
    """The error of the start, or, if the signal came just too late for that, of the first request."""
    message: dict[str, Any] = json.loads(program.lines.get(timeout=TIMEOUT_S + SLACK_S))
    if message["event"] == "ready":
        program.tell("generate")
        return program.hear("error", TIMEOUT_S + SLACK_S)
    assert message["event"] == "error", message
    return message


@pytest.mark.parametrize("seed", [666, 667], ids=["every rank", "rank 0"])
def test_ranks_stuck_in_their_own_code(seed: int) -> None:
    """Nobody waits in a collective, and every monitor beats: only rank 0's loop stands still."""
    env = {"YALIS_LOG_LEVEL": "INFO", "PYTHONPATH": "tests/support/stuck"}
    options = ("--tp", "2", "--dist-timeout", str(SHORT_S), "--seed", str(seed))
    with Program(*GENERATE, *options, "Once upon a time", env=env) as program:
        program.find_ranks(2)
        in_a_wait_of_the_engine(program)
        begin = time.monotonic()
        assert program.process.wait(3 * SHORT_S + SLACK_S + 10) == 1
        print(f"stuck: {time.monotonic() - begin:.2f} s")
        program.wait_gone(END_S)
        assert program.left_behind() == set()
    who = f"rank 0 on {socket.gethostname()} (pid {program.pids[0]}) was lost: its step did not end for "
    assert who in program.stderr
    assert "Traceback" not in program.stderr


def test_killed_caller_leaves_no_rank() -> None:
    with started(TP2_PP2) as program:
        ready(program, TP2_PP2)
        program.tell("generate")
        program.hear("running")
        program.process.kill()
        program.wait_gone(END_S)
        assert shared_names() <= program.shared_before


def test_close_leaves_nothing_behind() -> None:
    with started(TP2) as program:
        ready(program, TP2)
        program.tell("stats")
        program.hear("done")
        program.tell("close")
        program.hear("done", 5.0)
        assert not any(alive(pid) for pid in program.pids.values())
        assert program.left_behind() == set()
        program.tell("stats")
        assert "closed" in program.hear("error", 1.0)["message"]
        program.process.stdin.close()
        assert program.process.wait(10) == 0
        assert program.stderr == ""


GENERATE = ("yalis", "generate", "--model", str(DEMO), "--dist-timeout", str(TIMEOUT_S), "--cpu-threads", "1")
# Long enough never to end within a test: one request at a time, 900 tokens each.
ENDLESS = (*["This program is free software"] * 300, "--max-tokens", "900", "--ignore-eos", "--max-num-seqs", "1")


def in_a_wait_of_the_engine(program: Program) -> None:
    """Wait until the ranks generate: they have said what they load, and use the processor no more for that."""
    wait_for(lambda: program.stderr.count("KV cache") == len(program.pids), 30, "the start of the engine")
    time.sleep(1.0)


def test_interrupt_of_generate_ends_everything() -> None:
    with Program(*GENERATE, *ENDLESS, "--tp", "2", env={"YALIS_LOG_LEVEL": "INFO"}) as program:
        program.find_ranks(2)
        in_a_wait_of_the_engine(program)
        program.process.send_signal(signal.SIGINT)
        assert program.process.wait(TIMEOUT_S + SLACK_S) == 130
        program.wait_gone(0.5)
        assert program.left_behind() == set()
    assert [line for line in program.stderr.splitlines() if not line.startswith("I ")] == ["yalis: interrupted"]


def test_rank_lost_under_torchrun() -> None:
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")
    with Program(*launcher, *GENERATE, *ENDLESS, "--tp", "2", env={"YALIS_LOG_LEVEL": "INFO"}) as program:
        program.find_ranks(2)
        in_a_wait_of_the_engine(program)
        lost = time.monotonic()
        os.kill(program.pids[1], KILL)
        program.wait_gone(TIMEOUT_S + SLACK_S)
        print(f"torchrun, rank 1 SIGKILL: gone after {time.monotonic() - lost:.2f} s")
        assert program.process.wait(10) != 0
    who = f"rank 1 on {socket.gethostname()} (pid {program.pids[1]}) was lost: process died"
    told = [line for line in program.stderr.splitlines() if line.startswith("yalis: ")]
    # A second time if torchrun's SIGTERM came just after the first.
    assert told, program.stderr
    assert all(who in line for line in told), told
    assert program.stderr.count("Traceback (most recent") == 1  # torchrun's own, ChildFailedError
