"""torch's symmetric-memory all-reduce: GPUs of one host that read each other's memory directly.

One-shot (every rank reads everything) for short messages, two-shot (every rank sums a part, then reads the others'
parts) for longer ones. NVLink multicast is never used. Both kernels add in rank order, so all ranks get the same bits.
"""

from __future__ import annotations

from time import perf_counter
from typing import Any, ClassVar

import torch

from yalis.comm.algorithms.base import Algorithm
from yalis.comm.group import Group
from yalis.comm.peer_memory import PeerMemory
from yalis.comm.resources import Resources
from yalis.comm.stats import CommStats
from yalis.errors import CommError, PeerLostError

# Measured on two H200: one-shot is ahead up to 128 KiB, two-shot from 256 KiB on.
_ONE_SHOT_BYTES = 192 * 1024
# Longer messages travel in pieces of this size.
_BUFFER_BYTES = 16 * 2**20
# The kernels move 16 bytes at a time, and two-shot gives every rank a whole number of them.
_GRAIN = 16


class SymmMem(Algorithm):
    """``torch.ops.symm_mem`` over one buffer per group; float32 and bfloat16."""

    name: ClassVar[str] = "symm_mem"
    capturable: ClassVar[bool] = True

    def __init__(self, group: Group, resources: Resources, stats: CommStats) -> None:
        super().__init__(group, resources, stats)
        self._ops: Any = torch.ops.symm_mem
        try:
            self._memory = PeerMemory(group, _BUFFER_BYTES, self.name)
        except PeerLostError:
            raise
        except CommError as error:
            raise CommError(f"{error}; use nccl or auto") from error

    def all_reduce(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """See `Algorithm.all_reduce`."""
        start = perf_counter()
        source, target = x.view(-1), out.view(-1)
        room = _BUFFER_BYTES // x.itemsize
        for at in range(0, len(source), room):
            self._piece(source[at : at + room], target[at : at + room])
        self.stats.add(self.stats.flat, perf_counter() - start, x.nbytes)

    def _piece(self, x: torch.Tensor, out: torch.Tensor) -> None:
        grain = _GRAIN * self.group.size
        nbytes = -(-x.nbytes // grain) * grain
        shared = self._memory.buffer[:nbytes].view(x.dtype)
        count = len(x)
        shared[:count].copy_(x)
        if nbytes <= _ONE_SHOT_BYTES and nbytes == x.nbytes and out.data_ptr() % _GRAIN == 0:
            self._ops.one_shot_all_reduce_out(shared, "sum", self._memory.name, out)
        else:
            self._ops.two_shot_all_reduce_(shared, "sum", self._memory.name)
            out.copy_(shared[:count])

    def close(self, *, failed: bool) -> None:
        """See `Algorithm.close`."""
        self._memory.close(failed=failed)
