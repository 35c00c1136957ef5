"""torch's own all-reduce: gloo on CPU, NCCL on CUDA.

Bits: the same on every rank, since one rank reduces an element and the others copy it (tested for gloo).
Rounding: gloo adds in the tensor's own type, so bf16 and fp16 are rounded at every hop, P - 1 times instead of once.
"""

from __future__ import annotations

from time import perf_counter
from typing import ClassVar

import torch
import torch.distributed as dist

from yalis.comm.algorithms.base import Algorithm
from yalis.comm.group import in_line, wait_for


class TorchDist(Algorithm):
    """``ProcessGroup.allreduce`` of the group's backend."""

    name: ClassVar[str] = "torch"
    capturable: ClassVar[bool] = True

    def all_reduce(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """See `Algorithm.all_reduce`."""
        start = perf_counter()
        if out is not x:
            out.copy_(x)
        wait_for(self.group.backend.allreduce([out], in_line(dist.AllreduceOptions())))
        self.stats.add(self.stats.flat, perf_counter() - start, x.nbytes)
