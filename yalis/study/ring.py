"""A flat ring all-reduce over the communicator's point-to-point exchange: what `rd` is compared with on CPU ranks.

gloo's own all-reduce does not pass through the emulated network, so the ring that the model describes stands here:
P - 1 steps of reduce-scatter, P - 1 of all-gather, m/P bytes each.
"""

from __future__ import annotations

import torch

from yalis.comm.communicator import Communicator
from yalis.comm.shards import shard_bounds

_TAG = 64


def ring_all_reduce(comm: Communicator, x: torch.Tensor) -> None:
    """Sum ``x`` (contiguous) over the ranks, in place; every rank calls it with the same shape.

    The same bits on every rank: one rank finishes a shard and the others copy it. Rounds at every step.

    Raises:
        WaitFailed: a peer is gone or late.
    """
    ranks, flat = comm.size, x.view(-1)
    after, before = (comm.rank + 1) % ranks, (comm.rank - 1) % ranks
    bounds = [slice(*shard_bounds(flat.numel(), ranks, i)) for i in range(ranks)]
    for step in range(ranks - 1):
        leaving, arriving = flat[bounds[(comm.rank - step) % ranks]], flat[bounds[(comm.rank - step - 1) % ranks]]
        box = torch.empty_like(arriving)
        comm.group.swap([(leaving, after)], [(box, before)], _TAG + step)
        arriving += box
    for step in range(ranks - 1):
        leaving, arriving = flat[bounds[(comm.rank - step + 1) % ranks]], flat[bounds[(comm.rank - step) % ranks]]
        comm.group.swap([(leaving, after)], [(arriving, before)], _TAG + ranks + step)
