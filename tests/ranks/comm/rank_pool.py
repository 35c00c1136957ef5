"""A pool of rank processes that is forked once from a process with torch loaded, and then runs many small examples.

Functions that run in the ranks live in an importable module and take `Rank` first.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

from tests.support.forked import fork_context


@dataclass
class Rank:
    """What a rank process knows: its number, the store, and what earlier calls left in ``kept``."""

    rank: int
    store: Any
    kept: dict[Any, Any] = field(default_factory=dict)


class RankFailed(AssertionError):
    """A function raised in a rank; carries its traceback."""


class RankPool:
    """``size`` ranks. A context manager: on the way out every rank is killed and reaped."""

    def __init__(self, size: int) -> None:
        from torch.distributed import TCPStore

        context = fork_context()
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._pipes: list[Connection] = []
        self.processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self._store.port, theirs, list(sys.path)), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self.processes.append(process)

    def start(self, ranks: Sequence[int], function: Callable[..., Any], *args: Any) -> None:
        """Begin ``function(rank, *args)`` in some ranks."""
        for rank in ranks:
            self._pipes[rank].send((function, args))

    def collect(self, ranks: Sequence[int], timeout_s: float = 60.0) -> list[Any]:
        """Results of those ranks, in order; raises RankFailed if a function raised or did not end in time."""
        deadline = time.monotonic() + timeout_s
        results, failures = [], []
        for rank in ranks:  # every answer is taken before one is judged, so that the next call reads its own
            if not self._pipes[rank].poll(max(0.0, deadline - time.monotonic())):
                failures.append(f"rank {rank} gave no answer within {timeout_s:g} s")
                continue
            good, value = self._pipes[rank].recv()
            results.append(value)
            if not good:
                failures.append(f"rank {rank}:\n{value}")
        if failures:
            raise RankFailed("\n".join(failures))
        return results

    def run(self, count: int, function: Callable[..., Any], *args: Any, timeout_s: float = 60.0) -> list[Any]:
        """``function(rank, *args)`` on ranks 0 to count - 1; their results."""
        self.start(range(count), function, *args)
        return self.collect(range(count), timeout_s)

    def kill(self, rank: int) -> None:
        """kill -9 and reap one rank."""
        os.kill(self.processes[rank].pid, signal.SIGKILL)
        self.processes[rank].join(10)

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join(10)


def _serve(rank: int, port: int, pipe: Connection, path: list[str]) -> None:
    sys.path[:] = path
    import torch
    from torch.distributed import TCPStore

    torch.set_num_threads(1)
    me = Rank(rank, TCPStore("127.0.0.1", port, is_master=False))
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, function(me, *args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
