"""Two-shot all-reduce for long messages of GPUs on one node: docs/communicator.md, "Two-shot for long messages".

Sums are fp32 in rank order, rounded once, so all ranks get the same bits; with a norm the residual is rounded once
more, as where the two are called one after another.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import ClassVar

import torch

from yalis.comm.algorithms.base import Algorithm
from yalis.comm.group import Group
from yalis.comm.peer_memory import raise_if_failed
from yalis.comm.resources import Resources
from yalis.comm.stats import CommStats
from yalis.errors import CommError
from yalis.kernels import triton_two_shot as kernels

# Both halves, taken by every group that may choose this algorithm; longer messages go in pieces.
BUFFER_BYTES = 64 << 20
# A sum without a norm is divided in groups of so many elements: at least 32 bytes.
_UNIT = 16
# Longest row of a norm: one program has it in registers.
_MAX_HIDDEN = 32768


class TwoShot(Algorithm):
    """Scatter, reduce, finish over mapped memory, in pieces where a message needs more than there is."""

    name: ClassVar[str] = "two_shot"
    capturable: ClassVar[bool] = True

    def __init__(self, group: Group, resources: Resources, stats: CommStats) -> None:
        super().__init__(group, resources, stats)
        if resources.memory is None:
            raise CommError(f"two_shot: memory is not mapped for the group {list(group.ranks)}")
        self._memory = resources.memory

    def all_reduce(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """See `Algorithm.all_reduce`."""
        source, target = x.view(-1), out.view(-1)
        step = self._units_at_once(x.dtype, _UNIT) * _UNIT
        with self._launching(x.nbytes):
            for at in range(0, len(source), step):
                piece, result = source[at : at + step], target[at : at + step]
                exchange = self._exchange(x.dtype, _UNIT, -(-len(piece) // _UNIT), len(piece))
                kernels.scatter(piece, exchange)
                self._memory.meet()
                kernels.reduce(piece, result, exchange)
                self._memory.meet()
                kernels.finish(result, exchange)

    def fuses(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> bool:
        """See `Algorithm.fuses`."""
        hidden = x.shape[-1]
        return (
            hidden % _UNIT == 0
            and hidden <= _MAX_HIDDEN
            and self._units_at_once(x.dtype, hidden) > 0
            and residual.dtype == x.dtype == weight.dtype
            and residual.is_contiguous()
            and weight.is_contiguous()
        )

    def all_reduce_rmsnorm(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
        """See `Algorithm.all_reduce_rmsnorm`."""
        hidden = x.shape[-1]
        rows, held = x.view(-1, hidden), residual.view(-1, hidden)
        step = self._units_at_once(x.dtype, hidden)
        with self._launching(x.nbytes):
            for at in range(0, len(rows), step):
                piece, part = rows[at : at + step], held[at : at + step]
                exchange = self._exchange(x.dtype, hidden, len(piece), piece.numel())
                kernels.scatter(piece, exchange)
                self._memory.meet()
                kernels.reduce_norm(piece, part, weight, eps, exchange)
                self._memory.meet()
                kernels.finish_norm(piece, part, weight, eps, exchange)

    def _units_at_once(self, dtype: torch.dtype, unit: int) -> int:
        """Units of a piece: its shards fill the slots of a half."""
        slots = self.group.size - 1
        return self._memory.buffer.nbytes // 2 // slots // (unit * dtype.itemsize) * self.group.size

    def _exchange(self, dtype: torch.dtype, unit: int, units: int, count: int) -> kernels.Exchange:
        memory = self._memory
        return kernels.Exchange(
            self.group.index, self.group.size, memory.bases, memory.buffer.view(dtype), unit, units, count
        )

    @contextmanager
    def _launching(self, nbytes: int) -> Iterator[None]:
        """Kernels go to the group's device, whichever is current; time is counted; a failed device is a failed wait."""
        start = perf_counter()
        try:
            with torch.cuda.device(self.group.device):
                yield
        except RuntimeError as error:
            raise_if_failed(error)
            raise
        self.stats.add(self.stats.intra, perf_counter() - start, nbytes)
