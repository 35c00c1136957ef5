"""NVRAR: the fused hierarchical all-reduce of `yalis.comm.nvrar`, on CUDA and between CPU processes of one host.

Bits: the same on every rank; roundings by algorithm in docs/nvrar.md. Which algorithm, wire format and grid serve a
message is `Link.plan`, a pure function of topology, dtype, bytes and the tuned table that all ranks hold alike.
"""

from __future__ import annotations

from time import perf_counter
from typing import ClassVar

import torch

from yalis.comm.algorithms.base import Algorithm
from yalis.comm.group import Group
from yalis.comm.resources import Resources
from yalis.comm.stats import CommStats
from yalis.errors import CommError


class Nvrar(Algorithm):
    """One fused exchange per message; also fused with residual add and RMSNorm."""

    name: ClassVar[str] = "nvrar"
    capturable: ClassVar[bool] = True
    flat_equivalent: ClassVar[bool] = True

    def __init__(self, group: Group, resources: Resources, stats: CommStats) -> None:
        super().__init__(group, resources, stats)
        if resources.link is None:
            raise CommError(f"nvrar: its library is not open for the group {list(group.ranks)}")
        self._link = resources.link
        # The exchange does not tell the tiers apart; inside one node all of it is intra.
        self._inside = self._link.limits.nodes == 1

    def all_reduce(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """See `Algorithm.all_reduce`."""
        start = perf_counter()
        self._link.all_reduce(x, out)
        self._count(start, x.nbytes)

    def fuses(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> bool:
        """See `Algorithm.fuses`."""
        # Nothing here may depend on the rank: the fused call divides the message by rows, the other by packs.
        return (
            x.shape[-1] <= self._link.max_hidden
            and (x.device.type == "cpu" or x.shape[-1] * x.itemsize % 16 == 0)
            and residual.dtype == x.dtype == weight.dtype
            and residual.is_contiguous()
            and weight.is_contiguous()
        )

    def all_reduce_rmsnorm(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
        """See `Algorithm.all_reduce_rmsnorm`."""
        start = perf_counter()
        self._link.all_reduce_rmsnorm(x, residual, weight, eps, x)
        self._count(start, x.nbytes)

    def _count(self, start: float, nbytes: int) -> None:
        stats = self.stats
        stats.add(stats.intra if self._inside else stats.flat, perf_counter() - start, nbytes)
