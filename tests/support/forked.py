"""Processes forked from one with torch and the engine loaded: those imports cost each new process 1.4 s of a core.

The server that forks is one of multiprocessing's, one for each process that runs tests, and has no threads. Not under
coverage, which watches programs, and not where there may be a GPU. What a start from nothing is like is seen wherever
`yalis` itself starts ranks, and by the tests of launchers.
"""

from __future__ import annotations

import atexit
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import get_context, reduction
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import IO, Any

_PRELOAD = [
    "torch",
    "torch.distributed",
    "torch.distributed.elastic.agent.server.local_elastic_agent",
    "yalis.comm.communicator",
    "yalis.comm.shm",
    "yalis.engine.llm",
    "tests.ranks.comm.work",
]
_READ_BY_IMPORTS = {"PYTHONPATH", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"}


def fork_context() -> ForkServerContext:
    """Multiprocessing's, with torch loaded and no pool of threads."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    return context


def may_fork(env: Mapping[str, str] | None) -> bool:
    """Whether a process with this environment (None: ours) may be forked: imports have read some of it."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == ""
    watched = any(name.startswith(("COV_CORE", "COVERAGE_")) for name in os.environ)
    same = env is None or all(env.get(name, "") == os.environ.get(name, "") for name in _READ_BY_IMPORTS)
    return hidden and not watched and same


class _Descriptor:
    """A file descriptor that reaches the child."""

    def __init__(self, number: int):
        self.number = number

    def __reduce__(self) -> Any:
        return _inherited, (reduction.DupFd(self.number),)


def _inherited(duplicate: Any) -> _Descriptor:
    return _Descriptor(duplicate.detach())


class Forked:
    """A forked process with `subprocess.Popen`'s ways, as far as tests need them.

    Args:
        function: at module level; its end is the interpreter's, as that of a program.
        env: the whole environment; None: ours.
        cwd: its folder.
        stdin, stdout, stderr: as Popen's; text.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *args: Any,
        cwd: Path,
        env: Mapping[str, str] | None = None,
        stdin: int | IO[Any] = subprocess.DEVNULL,
        stdout: int | IO[Any] = subprocess.DEVNULL,
        stderr: int | IO[Any] = subprocess.DEVNULL,
    ) -> None:
        self.stdin: IO[str] | None = None
        self.stdout: IO[str] | None = None
        self.stderr: IO[str] | None = None
        theirs, opened = [], []
        for name, where in (("stdin", stdin), ("stdout", stdout), ("stderr", stderr)):
            if where == subprocess.PIPE:
                ends = os.pipe()  # to read, to write
                child, ours = ends if name == "stdin" else ends[::-1]
                setattr(self, name, os.fdopen(ours, "w" if name == "stdin" else "r"))
                opened.append(child)
            elif where == subprocess.DEVNULL:
                child = os.open(os.devnull, os.O_RDWR)
                opened.append(child)
            else:
                assert not isinstance(where, int)
                child = where.fileno()
            theirs.append(_Descriptor(child))
        begin = (function, args, dict(os.environ if env is None else env), str(cwd), theirs)
        self._process = fork_context().Process(target=_begin, args=begin, daemon=True)
        self._process.start()
        for child in opened:
            os.close(child)
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
            raise subprocess.TimeoutExpired("a forked process", timeout or 0.0)
        return code

    def send_signal(self, number: signal.Signals) -> None:
        """Nothing happens to one that has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """As Popen's."""
        self.send_signal(signal.SIGKILL)


def start_module(
    words: Sequence[str], *, cwd: Path, env: Mapping[str, str] | None = None, **streams: Any
) -> subprocess.Popen[str] | Forked:
    """``python -m words[0] words[1:]``, forked where that is possible; ``streams`` as Popen's."""
    if may_fork(env):
        return Forked(_run_module, list(words), cwd=cwd, env=env, **streams)
    return subprocess.Popen([sys.executable, "-m", *words], cwd=cwd, env=env, text=True, **streams)


def run_module(
    *words: str, cwd: Path, timeout: float, env: Mapping[str, str] | None = None, input: str | None = None
) -> subprocess.CompletedProcess[str]:
    """`start_module`, its end and what it printed; reads ``input`` from its stdin.

    Raises:
        subprocess.TimeoutExpired: it ran on, and was killed.
    """
    with (
        tempfile.TemporaryFile("w+") as given,
        tempfile.TemporaryFile("w+") as out,
        tempfile.TemporaryFile("w+") as err,
    ):
        given.write(input or "")
        given.flush()
        given.seek(0)
        process = start_module(words, cwd=cwd, env=env, stdin=given, stdout=out, stderr=err)
        try:
            code = process.wait(timeout)
        except BaseException:
            process.kill()
            process.wait(10)
            raise
        for file in (out, err):
            file.seek(0)
        return subprocess.CompletedProcess(list(words), code, out.read(), err.read())


def _run_module(words: list[str]) -> None:
    sys.argv = words
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)


def _begin(
    function: Callable[..., Any], args: tuple[Any, ...], env: dict[str, str], cwd: str, streams: list[_Descriptor]
) -> None:
    for number, stream in enumerate(streams):
        os.dup2(stream.number, number)
        os.close(stream.number)
    sys.stdin = os.fdopen(0, closefd=False)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    tempfile.tempdir = None  # was found before TMPDIR was known
    try:
        function(*args)
    finally:  # multiprocessing ends its children without what programs registered for their end
        sys.stdout.flush()
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
