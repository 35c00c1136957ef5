"""A group of one: identities, no torch.distributed, the same refusals as a larger group."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from yalis.comm import Communicator, NullGuard, Topology, init_distributed
from yalis.errors import CommError, ConfigError, TopologyError


def test_everything_is_an_identity() -> None:
    init_distributed(Topology())
    assert not dist.is_initialized()
    with Communicator.create(Topology(), [0]) as comm:
        x = torch.randn(3, 4)
        assert (comm.rank, comm.size, comm.ranks) == (0, 1, (0,))
        assert comm.all_reduce(x) is x
        out = torch.empty_like(x)
        assert comm.all_reduce(x, out=out) is out
        assert torch.equal(out, x)
        assert comm.all_gather(x, dim=0) is x
        assert comm.broadcast(x, 0) is x
        assert comm.agree_min(7) == 7
        comm.barrier()
        assert comm.stats.as_dict()["flat"]["calls"] == 0


def test_a_member_alone_in_a_larger_world_needs_no_store() -> None:
    comm = Communicator.create(Topology(3, 4, 2), [3])
    assert float(comm.all_reduce(torch.ones(1))) == 1.0


def test_fused_norm_equals_its_parts() -> None:
    comm = Communicator.create(Topology(), [0])
    x, residual, weight = torch.randn(5, 32), torch.randn(5, 32), torch.randn(32)
    hidden = residual + x
    normed = weight * hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-6)
    got, kept = comm.all_reduce_rmsnorm(x.clone(), residual.clone(), weight, 1e-6)
    assert torch.equal(kept, hidden)
    torch.testing.assert_close(got, normed)


def test_groups_that_cannot_be() -> None:
    topology = Topology(0, 4, 2)
    with pytest.raises(TopologyError, match="not in the group"):
        Communicator.create(topology, [1, 2])
    with pytest.raises(TopologyError, match="distinct"):
        Communicator.create(topology, [0, 0])
    with pytest.raises(TopologyError, match="rank 4"):
        Communicator.create(topology, [0, 4])
    with pytest.raises(TopologyError, match="init_distributed"):
        Communicator.create(topology, [0, 1])
    with pytest.raises(ConfigError, match="'ring'"):
        Communicator.create(topology, [0], algorithm="ring")
    comm = Communicator.create(topology, [0])
    with pytest.raises(CommError, match="dst=0"):
        comm.isend(torch.ones(1), 0)


def test_null_guard_names_what_it_knows() -> None:
    guard = NullGuard({2: "host-c"})
    error = guard.explain("L1.attn.out/allreduce[shm,64B]", RuntimeError("reset\nmore"), 2)
    assert (error.rank, error.host, error.waiting_for) == (2, "host-c", "L1.attn.out/allreduce[shm,64B]")
    assert "rank 2 on host host-c" in str(error)
    assert "more" not in str(error)
    assert guard.explain("x", None, None).rank is None
    assert guard.abort_flag_address() == 0
