"""``yalis chat`` on a terminal and in a pipe."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from tests.support.checkpoints import DEMO
from tests.support.forked import run_module
from tests.support.ranks import ROOT
from tests.support.terminal import Terminal

WORDS = ["yalis", "chat", "--model", str(DEMO), "--temperature", "0", "--cpu-threads", "1"]
COMMAND = [sys.executable, "-m", *WORDS]
ENV = os.environ | {"OMP_NUM_THREADS": "1", "TERM": "dumb"}


def piped(text: str, *options: str) -> subprocess.CompletedProcess[str]:
    return run_module(*WORDS, *options, input=text, cwd=ROOT, env=ENV, timeout=60)


def test_piped_conversation_is_plain() -> None:
    done = piped(
        "What is free software?\n\n/stats\n/reset\nWhat is free software?\n/nonsense now\n", "--max-tokens", "8"
    )
    assert done.returncode == 0
    first, second = done.stdout.splitlines()  # an answer a line, and no prompt in between
    assert first == second  # the same question after /reset is the same conversation
    assert "\x1b" not in done.stdout + done.stderr
    stats, unknown = done.stderr.splitlines()
    assert "steps, " in stats
    assert "KV use" in stats
    assert unknown.startswith("unknown command /nonsense: /reset forgets")


def test_system_message_opens_the_conversation() -> None:
    plain, told = (piped("Hello\n", "--max-tokens", "8", *system) for system in ((), ("--system", "You may copy")))
    assert (plain.returncode, told.returncode, plain.stderr, told.stderr) == (0, 0, "", "")
    assert plain.stdout != told.stdout


def test_conversation_that_outgrows_the_context_is_refused_and_goes_on() -> None:
    done = piped("free software " * 600 + "\nHello\n", "--max-tokens", "4")
    assert done.returncode == 0
    assert done.stdout.count("\n") == 1
    assert done.stderr.count("\n") == 1
    assert "the limit is 1023" in done.stderr
    assert "/reset" in done.stderr


def test_terminal_conversation() -> None:
    terminal = Terminal([*COMMAND, "--max-tokens", "900", "--ignore-eos"], ENV)
    try:
        at = terminal.wait_for("/exit ends; Ctrl-C stops an answer")
        at = terminal.wait_for("> ", at)
        terminal.type("What is free software?\n")
        at = terminal.wait_for("software?", at)
        terminal.wait_for(" ", at + 2)  # the answer is coming
        os.kill(terminal.process.pid, signal.SIGINT)
        at = terminal.wait_for("\n> ", len(terminal.seen))  # Ctrl-C stops the answer, not the program
        terminal.type("/stats\n")
        at = terminal.wait_for("KV use 0%", at)  # and gives its memory back
        at = terminal.wait_for("> ", at)
        terminal.type("/exit\n")
        assert terminal.process.wait(15) == 0
    finally:
        terminal.close()


def test_interrupt_at_the_prompt_ends_the_program() -> None:
    terminal = Terminal(COMMAND, ENV)
    try:
        terminal.wait_for("> ")
        time.sleep(0.5)  # from the prompt to the read that the signal is to interrupt
        os.kill(terminal.process.pid, signal.SIGINT)
        terminal.wait_for("yalis: interrupted")
        assert terminal.process.wait(15) == 130
    finally:
        terminal.close()


def test_help_has_examples() -> None:
    done = subprocess.run([*COMMAND[:4], "--help"], capture_output=True, text=True, cwd=ROOT, timeout=30)
    assert done.returncode == 0
    assert "examples:\n  yalis chat --model models/demo" in done.stdout
