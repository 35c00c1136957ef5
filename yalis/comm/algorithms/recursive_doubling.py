"""Hierarchical recursive doubling: reduce-scatter inside a node, doubling between nodes, all-gather inside.

With N nodes of G ranks, rank g of every node owns shard g (1/G of the message) between the two intra-node steps, so
each rank sends only its shard over the network, log2(N) times. If N is no power of two, the nodes above the largest
power first add their shard into a partner below it and receive the result at the end (two more hops).

Bits: inside a node one rank sums a shard (in local-rank order, fp32, one rounding). A doubling step adds two partial
sums *as they travel*, rounded to the message's dtype, and in node order: both partners add the same two numbers, so
they get the same bits, and by induction all nodes do. Each step rounds once.

A group with unequal numbers of ranks per node, or whose nodes interleave, is treated as if every rank were a node.
"""

from __future__ import annotations

from time import perf_counter
from typing import ClassVar

import torch

from yalis.comm.algorithms.base import Algorithm
from yalis.comm.group import Group
from yalis.comm.resources import Resources
from yalis.comm.shards import shard_bounds
from yalis.comm.stats import CommStats

# Messages between two ranks arrive in order, so tags only make a broken protocol fail early instead of summing rubbish.
_TAG_SCATTER, _TAG_FOLD, _TAG_UNFOLD, _TAG_GATHER, _TAG_STEP = 1, 2, 3, 4, 16


class RecursiveDoubling(Algorithm):
    """Works on any torch backend with point-to-point, any number of nodes and ranks; CPU or CUDA."""

    name: ClassVar[str] = "rd"
    flat_equivalent: ClassVar[bool] = True

    def __init__(self, group: Group, resources: Resources, stats: CommStats) -> None:
        super().__init__(group, resources, stats)
        segment = resources.segment
        shape = group.shape
        hierarchical = bool(shape.ranks_per_node) and shape.contiguous
        self._per_node = shape.ranks_per_node if hierarchical else 1
        self._nodes = group.size // self._per_node
        self._node, self._local = divmod(group.index, self._per_node)
        self._segment = segment if segment is not None and segment.ranks == self._per_node else None

    def all_reduce(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """See `Algorithm.all_reduce`."""
        source, target = x.view(-1), out.view(-1)
        clock = perf_counter()
        start, end = shard_bounds(source.numel(), self._per_node, self._local)
        shard = target[start:end]
        if self._per_node > 1:
            self._reduce_scatter(source, shard)
            now = perf_counter()
            self.stats.add(self.stats.intra, now - clock, x.nbytes)
            clock = now
        elif out is not x:
            shard.copy_(source)
        if self._nodes > 1:
            if shard.numel():
                self._between_nodes(shard)
            now = perf_counter()
            self.stats.add(self.stats.inter, now - clock, shard.nbytes)
            clock = now
        if self._per_node > 1:
            self._all_gather(shard, target)
            self.stats.add(self.stats.intra, perf_counter() - clock, x.nbytes)

    # ---- inside a node ----------------------------------------------------------------------------------------

    def _neighbour(self, local: int) -> int:
        return self._node * self._per_node + local

    def _others(self) -> list[int]:
        return [(self._local + i) % self._per_node for i in range(1, self._per_node)]

    def _reduce_scatter(self, source: torch.Tensor, shard: torch.Tensor) -> None:
        """``shard`` (a part of the output; in place also of the input) = this rank's shard of the node's sum."""
        if self._segment is not None:
            self._segment.reduce_scatter(source, shard)
            return
        pieces = [source[slice(*shard_bounds(source.numel(), self._per_node, j))] for j in range(self._per_node)]
        arrived = torch.empty((self._per_node, shard.numel()), dtype=source.dtype, device=source.device)
        self.group.swap(
            [(pieces[j], self._neighbour(j)) for j in self._others()],
            [(arrived[j], self._neighbour(j)) for j in self._others()],
            _TAG_SCATTER,
        )
        arrived[self._local] = pieces[self._local]
        total = arrived[0].float()
        for j in range(1, self._per_node):  # one at a time: torch's own sum over a dimension promises no order
            total += arrived[j]
        shard.copy_(total)

    def _all_gather(self, shard: torch.Tensor, target: torch.Tensor) -> None:
        if self._segment is not None:
            self._segment.all_gather(shard, target)
            return
        bounds = [shard_bounds(target.numel(), self._per_node, j) for j in range(self._per_node)]
        self.group.swap(
            [(shard, self._neighbour(j)) for j in self._others()],
            [(target[slice(*bounds[j])], self._neighbour(j)) for j in self._others()],
            _TAG_GATHER,
        )

    # ---- between nodes ----------------------------------------------------------------------------------------

    def _counterpart(self, node: int) -> int:
        return node * self._per_node + self._local

    def _between_nodes(self, shard: torch.Tensor) -> None:
        """Sum ``shard`` over the ranks with this local rank on all nodes, in place."""
        power = 1 << (self._nodes.bit_length() - 1)
        extras = self._nodes - power
        arrived = torch.empty_like(shard)
        if self._node >= power:
            partner = self._counterpart(self._node - power)
            self.group.swap([(shard, partner)], [], _TAG_FOLD)
            waited = _waiting_box(shard)
            self.group.swap([], [(shard, partner), (waited, partner)], _TAG_UNFOLD, answer=True)
            self.group.waited_s += float(waited.sum())
            return
        if self._node < extras:
            self.group.swap([], [(arrived, self._counterpart(self._node + power))], _TAG_FOLD)
            shard += arrived
        before_s = self.group.waited_s
        step, distance = 0, 1
        while distance < power:
            other = self._node ^ distance
            peer = self._counterpart(other)
            self.group.swap([(shard, peer)], [(arrived, peer)], _TAG_STEP + step)
            # The lower node's number first on both sides: addition commutes except in the payload of a NaN.
            low, high = (shard, arrived) if self._node < other else (arrived, shard)
            torch.add(low, high, out=shard)
            step, distance = step + 1, distance * 2
        if self._node < extras:
            waited = _waiting_box(shard)
            waited += self.group.waited_s - before_s
            peer = self._counterpart(self._node + power)
            self.group.swap([(shard, peer), (waited, peer)], [], _TAG_UNFOLD, answer=True)


def _waiting_box(shard: torch.Tensor) -> torch.Tensor:
    """For the seconds of waiting that go with the result: who folds in cannot see the doubling, so its partner tells it
    how long it waited there. Empty where nobody measures."""
    return torch.zeros(1 if shard.device.type == "cpu" else 0, dtype=torch.float64)
