"""``yalis chat`` over two ranks: what is typed reaches the engine in other processes, and Ctrl-C reaches the answer."""

from __future__ import annotations

import os
import signal
import sys

import psutil

from tests.support.checkpoints import DEMO
from tests.support.forked import run_module
from tests.support.ranks import ROOT
from tests.support.terminal import Terminal

CHAT = ["yalis", "chat", "--model", str(DEMO), "--temperature", "0", "--cpu-threads", "1", "--tp", "2"]
COMMAND = [sys.executable, "-m", *CHAT]
ENV = os.environ | {"OMP_NUM_THREADS": "1", "TERM": "dumb"}
QUESTION = "What is free software?"


def test_piped_conversation_over_ranks() -> None:
    text = f"{QUESTION}\n/stats\nAnd why?\n/reset\n{QUESTION}\n"
    done = run_module(*CHAT, "--max-tokens", "8", input=text, cwd=ROOT, env=ENV, timeout=90)
    assert done.returncode == 0, done.stderr
    first, other, again = done.stdout.splitlines()
    assert first == again != other  # after /reset the same question is the same conversation
    [stats] = done.stderr.splitlines()
    assert "steps, " in stats and "KV use 0%" in stats


def test_interrupt_of_an_answer_over_ranks() -> None:
    terminal = Terminal([*COMMAND, "--max-tokens", "900", "--ignore-eos"], ENV)
    try:
        at = terminal.wait_for("> ", timeout_s=60.0)
        for _ in range(2):
            terminal.type(f"{QUESTION}\n")
            at = terminal.wait_for("software?", at)
            while len(terminal.seen) < at + 40:  # the answer is coming
                terminal.wait_for(" ", len(terminal.seen))
            ranks = psutil.Process(terminal.process.pid).children(recursive=True)
            assert len(ranks) >= 2
            os.killpg(terminal.process.pid, signal.SIGINT)  # as a terminal does: every process in the foreground
            at = terminal.wait_for("\n> ", len(terminal.seen))
            terminal.type("/stats\n")
            at = terminal.wait_for("KV use 0%", at)  # the ranks dropped the answer
            at = terminal.wait_for("> ", at)
            terminal.type("/reset\n")
            at = terminal.wait_for("> ", at)
        terminal.type("/exit\n")
        assert terminal.process.wait(30) == 0
        assert psutil.wait_procs(ranks, 10)[1] == []
    finally:
        terminal.close()
    assert "lost" not in terminal.seen
