"""What ``yalis generate`` and ``yalis demo`` show on a terminal and not in a pipe: bars of progress, drawn tables."""

from __future__ import annotations

import os
import sys

from tests.support.checkpoints import DEMO
from tests.support.terminal import Terminal

ENV = os.environ | {"OMP_NUM_THREADS": "1", "TERM": "xterm", "COLUMNS": "100"}
FAST = ("--cpu-threads", "1", "--max-tokens", "4")


def shown(*argv: str) -> str:
    """All that a command that ends well writes to a terminal."""
    terminal = Terminal([sys.executable, "-m", "yalis", *argv], ENV)
    try:
        return terminal.wait_end(100)
    finally:
        terminal.close()


def test_generate_shows_bars_and_removes_them() -> None:
    prompts = ("You may copy", "The licenses", "THE SOFTWARE")
    seen = shown("generate", "--model", str(DEMO), "--temperature", "0", *FAST, *prompts)
    for bar in ("loading weights", "generating"):
        assert bar in seen
    assert "3/3" in seen
    assert "━" in seen
    last = seen.rindex("\x1b[2K")  # the line of a bar is wiped when it is done, and text follows
    assert "━" not in seen[last:]
    assert all(f"\n{prompt}" in seen[last:] or f"K{prompt}" in seen[last:] for prompt in prompts)


def test_demo_draws_its_table() -> None:
    seen = shown("demo", "--tp", "2", "--ranks-per-node", "1", "--algorithms", "rd", *FAST)
    assert "───" in seen  # the rule under the header, which a pipe does not get
    header = next(line for line in seen.splitlines() if "TTFT" in line and "TPOT" in line)
    assert "start" in header
    assert any(line.split()[:1] == ["rd"] for line in seen.splitlines())
