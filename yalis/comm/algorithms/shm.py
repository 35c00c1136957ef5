"""All-reduce through shared memory: every rank of the group on one host.

Summed in order of the group's ranks with fp32 accumulation and one rounding, so the bits depend neither on the size of
the message nor on the rank.
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


class SharedMemory(Algorithm):
    """One-shot for short messages, two-shot in pieces for longer ones (`yalis.comm.shm`)."""

    name: ClassVar[str] = "shm"

    def __init__(self, group: Group, resources: Resources, stats: CommStats) -> None:
        super().__init__(group, resources, stats)
        segment = resources.segment
        if segment is None or segment.ranks != group.size:
            raise CommError(f"shm: the group {list(group.ranks)} does not share one segment of memory")
        self._reduce = segment.all_reduce

    def all_reduce(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """See `Algorithm.all_reduce`."""
        start = perf_counter()
        self._reduce(x, out)
        self.stats.add(self.stats.intra, perf_counter() - start, x.nbytes)
