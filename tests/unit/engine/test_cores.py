"""Which cores a rank gets."""

from __future__ import annotations

import pytest

from yalis.comm.topology import Topology
from yalis.engine.cores import cores_of_rank


def rank(index: int, on_host: int, world: int | None = None) -> Topology:
    return Topology(
        rank=index, world_size=world or on_host, ranks_per_node=on_host, device_index=index, ranks_on_host=on_host
    )


@pytest.mark.parametrize(("ranks", "cores"), [(2, 2), (2, 8), (3, 8), (4, 4)])
def test_shares_are_equal_and_disjoint(ranks, cores):
    shares = [cores_of_rank(range(10, 10 + cores), 64, rank(i, ranks), "torchrun") for i in range(ranks)]
    assert all(alone for _, alone in shares)
    assert {len(share) for share, _ in shares} == {cores // ranks}
    used = [core for share, _ in shares for core in share]
    assert len(used) == len(set(used))


def test_more_ranks_than_cores_share_all():
    assert cores_of_rank([0, 1], 2, rank(3, 4), "torchrun") == ([0, 1], False)


def test_one_rank_keeps_everything():
    assert cores_of_rank([1, 0], 2, Topology(), None) == ([0, 1], True)


def test_binding_of_the_launcher_is_respected():
    assert cores_of_rank([4, 5], 8, rank(1, 4), "slurm") == ([4, 5], True)
    assert cores_of_rank(range(8), 8, rank(1, 4), "slurm") == ([2, 3], True)
