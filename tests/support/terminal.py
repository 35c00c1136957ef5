"""Runs a program on a pseudo-terminal."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import time
from collections.abc import Mapping

from tests.support.ranks import ROOT


class Terminal:
    """A program whose stdin, stdout and stderr are a terminal."""

    def __init__(self, command: list[str], env: Mapping[str, str]):
        self._ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT, env=env, start_new_session=True
        )
        os.close(theirs)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def wait_for(self, text: str, after: int = 0, timeout_s: float = 30.0) -> int:
        """Wait until ``text`` stands on the terminal behind position ``after``; returns the position behind it."""
        deadline = time.monotonic() + timeout_s
        while text not in self.seen[after:]:
            assert time.monotonic() < deadline, f"no {text!r} in {self.seen[after:]!r}"
            if select.select([self._ours], [], [], 0.1)[0]:
                try:
                    self.seen += os.read(self._ours, 65536).decode(errors="replace")
                except OSError:  # the program has closed its end
                    assert text in self.seen[after:], self.seen
        return self.seen.index(text, after) + len(text)

    def wait_end(self, timeout_s: float = 60.0) -> str:
        """All that the program writes until it ends, which must be well and in time."""
        deadline = time.monotonic() + timeout_s
        while True:
            assert time.monotonic() < deadline, f"no end within {timeout_s:g} s: {self.seen!r}"
            if select.select([self._ours], [], [], 0.1)[0]:
                try:
                    self.seen += os.read(self._ours, 65536).decode(errors="replace")
                except OSError:  # the program, and whatever it started, has closed its end
                    break
        assert self.process.wait(max(0.1, deadline - time.monotonic())) == 0, self.seen
        return self.seen

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        os.close(self._ours)
