"""A chain of calls timed as one inside a CUDA graph, as a decode step makes them.

A call that the host launches costs at least the launch; in a graph it costs what the device takes. A chain is captured
once and replayed; CUDA events around a replay tell its time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from yalis.comm.communicator import Communicator

Call = Callable[[], object]
# Cycles for which the stream spins before it meets the other ranks, about 0.3 ms: longer than it takes every rank's
# host to come out of the barrier and to enqueue the replay.
_AHEAD_CYCLES = 500_000
_cuda: Any = torch.cuda  # its type information lacks the arguments


class Chain(Protocol):
    """Calls that run in a row."""

    def run(self) -> float:
        """Seconds of the whole chain, once."""
        ...


class Captured:
    """The calls in one CUDA graph.

    Args:
        calls: what to capture; they are kept, and with them the tensors that they hold.
        align: a collective that is made before the clock starts, so that all ranks start together; None: no other
            rank takes part.
    """

    def __init__(self, calls: Sequence[Call], device: torch.device, align: Call | None = None):
        self._align = align
        self._calls = tuple(calls)  # they hold the tensors that the graph points to
        torch.cuda.synchronize(device)  # what the calls read was made on another stream
        self._stream = _cuda.Stream(device)
        with torch.cuda.stream(self._stream):
            for _ in range(2):  # compiles, makes scratch memory, connects
                calls[0]()
            self._stream.synchronize()
            self._graph: Any = _cuda.CUDAGraph()
            # Other threads (NCCL's watchdog) may call CUDA meanwhile: only this one's calls must be capturable.
            self._graph.capture_begin(capture_error_mode="thread_local")
            try:
                for call in calls:
                    call()
            finally:
                self._graph.capture_end()

    def run(self) -> float:
        """Seconds of the whole chain, once, by the device's clock."""
        begin, end = (_cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(self._stream):
            if self._align is not None:
                _cuda._sleep(_AHEAD_CYCLES)
                self._align()
            begin.record(self._stream)
            self._graph.replay()
            end.record(self._stream)
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e-3

    def close(self) -> None:
        """Let go of the graph: before the communicator that it calls, since NCCL waits for its graphs."""
        self._stream.synchronize()
        self._graph.reset()


def time_chain(pacer: Communicator, chain: Chain, length: int, *, iters: int, warmup: int) -> list[float]:
    """Seconds per call of ``iters`` runs of a chain of ``length`` calls, each the longest over the ranks (collective).

    Args:
        pacer: over the same ranks, best on CPU: a barrier before each run, and the gathering of samples.
    """
    samples = torch.empty(iters, dtype=torch.float64)
    for i in range(-warmup, iters):
        pacer.barrier()
        seconds = chain.run()
        if i >= 0:
            samples[i] = seconds / length
    everyone = pacer.all_gather(samples.to(pacer.device).unsqueeze(0), dim=0)
    longest: list[float] = everyone.max(dim=0).values.tolist()
    return longest
