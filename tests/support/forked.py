"""Processes forked from one with torch loaded: its import costs each new process a second of a core.

The server that forks is one of multiprocessing's, one for each process that runs tests, and has no threads. Not under
coverage, which watches programs, and not where there may be a GPU.
"""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from multiprocessing import get_context
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

_PRELOAD = ["torch", "torch.distributed", "yalis.comm.communicator", "yalis.comm.shm", "tests.ranks.comm.work"]

_READ_BY_IMPORTS = {"PYTHONPATH", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"}


def fork_context() -> ForkServerContext:
    """Multiprocessing's, with torch loaded and no pool of threads."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    return context


def may_fork(changed: Mapping[str, str]) -> bool:
    """Whether a process may be forked that is to have these variables besides: imports have read some of them."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == ""
    watched = any(name.startswith(("COV_CORE", "COVERAGE_")) for name in os.environ)
    return (
        hidden and not watched and changed.keys().isdisjoint({"PYTHONPATH", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"})
    )


class Forked:
    """A forked process with `subprocess.Popen`'s ways, as far as tests need them.

    Args:
        function: at module level; its end is the interpreter's, as that of a program.
        env: the whole environment. cwd: its folder. out, err: files for what it prints.
    """

    def __init__(
        self, function: Callable[..., Any], *args: Any, env: Mapping[str, str], cwd: Path, out: Path, err: Path
    ) -> None:
        for path in (out, err):
            path.touch()  # it may be read before the process is there
        begin = (function, args, dict(env), str(cwd), str(out), str(err))
        self._process = fork_context().Process(target=_begin, args=begin, daemon=True)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """As Popen's, and never old."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """The return code; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """The return code.

        Raises:
            subprocess.TimeoutExpired: it runs on.
        """
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            raise subprocess.TimeoutExpired("a forked rank", timeout or 0.0)
        return code

    def send_signal(self, number: signal.Signals) -> None:
        """Nothing happens to one that has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """As Popen's."""
        self.send_signal(signal.SIGKILL)


def _begin(
    function: Callable[..., Any], args: tuple[Any, ...], env: dict[str, str], cwd: str, out: str, err: str
) -> None:
    for path, flags, number in ((os.devnull, os.O_RDONLY, 0), (out, os.O_WRONLY, 1), (err, os.O_WRONLY, 2)):
        opened = os.open(path, flags)
        os.dup2(opened, number)
        os.close(opened)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    try:
        function(*args)
    finally:  # multiprocessing ends its children without what programs registered for their end
        sys.stdout.flush()
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
