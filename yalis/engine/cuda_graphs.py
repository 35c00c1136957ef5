"""CUDA graphs of whole steps: one for each size, captured at start, replayed with new values at fixed addresses.

Graphs share one pool of memory, because no two of them run at the same time: what a step needs in between is there
once, for the largest. What a graph leaves stays at its address until it is replayed again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

_cuda: Any = torch.cuda  # its type information lacks the arguments

# Device memory of one layer in one graph, besides its tensors: 9 to 15 MiB for 32 layers on an H100 (driver 580).
_LAYER_NBYTES = 480 << 10

SizeT = TypeVar("SizeT", bound=Hashable)
OutputT = TypeVar("OutputT")


@dataclass(frozen=True)
class CaptureReceipt:
    """What capturing took: graphs made, seconds, bytes of device memory."""

    num_graphs: int
    seconds: float
    nbytes: int


@dataclass(frozen=True)
class GraphLimits:
    """Which steps get graphs: decodes of up to ``decode_batch`` sequences, steps with prompts of up to
    ``prefill_tokens`` tokens; 0 for none."""

    decode_batch: int = 0
    prefill_tokens: int = 0


def graph_nbytes(num_graphs: int, num_layers: int) -> int:
    """Device memory that graphs of ``num_layers`` layers take besides the tensors inside, in bytes; at the upper end of
    what was measured."""
    return num_graphs * num_layers * _LAYER_NBYTES


class GraphMemory:
    """The memory that graphs share, and the stream on which they are captured.

    Args:
        device: of both.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = _cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()


class CaptureClock:
    """Takes the time and the memory of captures from its making on; no memory may be freed meanwhile."""

    def __init__(self, device: torch.device):
        torch.cuda.synchronize(device)
        self._device = device
        self._started = time.perf_counter()
        self._free = torch.cuda.mem_get_info(device)[0]

    def receipt(self, num_graphs: int) -> CaptureReceipt:
        """Of what was captured until now."""
        torch.cuda.synchronize(self._device)
        taken = max(0, self._free - torch.cuda.mem_get_info(self._device)[0])
        return CaptureReceipt(num_graphs, time.perf_counter() - self._started, taken)


class CudaGraphs(Generic[SizeT, OutputT]):
    """Graphs by the size of their step."""

    def __init__(self) -> None:
        self._graphs: dict[SizeT, tuple[torch.cuda.CUDAGraph, OutputT]] = {}

    @property
    def sizes(self) -> list[SizeT]:
        """Those that have a graph, in the order of capture."""
        return list(self._graphs)

    def capture(
        self, size: SizeT, prepare: Callable[[], None], body: Callable[[], OutputT], memory: GraphMemory
    ) -> None:
        """Capture ``body`` as the graph of ``size``; the larger ones first, so that the others fit into their memory.

        Collective where ``body`` is.

        Args:
            prepare: enqueues inputs that let ``body`` run without a trace.
            body: from inputs at fixed addresses to outputs.
        """
        with torch.cuda.stream(memory.stream):
            prepare()
            # Libraries choose kernels, Triton compiles, NCCL connects: none of it may happen inside of the capture.
            body()
            memory.stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            # Other threads (NCCL's watchdog) may call CUDA meanwhile: only this one's calls must be capturable.
            graph.capture_begin(pool=memory.pool, capture_error_mode="thread_local")
            try:
                output = body()
            except BaseException:
                with suppress(RuntimeError):  # it would hide why
                    graph.capture_end()
                raise
            graph.capture_end()
        self._graphs[size] = (graph, output)

    def __contains__(self, size: object) -> bool:
        return size in self._graphs

    def replay(self, size: SizeT) -> OutputT:
        """Enqueue the graph of ``size`` and return what it leaves."""
        graph, output = self._graphs[size]
        graph.replay()
        return output

    def clear(self) -> None:
        """Drop the graphs and their memory."""
        self._graphs.clear()
