"""CPU ranks stand on cores of their own, unless told not to."""

from __future__ import annotations

import os

import pytest

from tests.support.checkpoints import DEMO
from yalis.config import EngineConfig
from yalis.engine.client import EngineClient


@pytest.mark.parametrize("bind", [True, False])
def test_ranks_are_bound_to_disjoint_shares(bind: bool) -> None:
    allowed = os.sched_getaffinity(0)
    if len(allowed) < 2:
        pytest.skip("needs two usable cores; run on a machine or in a container that has them")
    client = EngineClient(EngineConfig(str(DEMO), tensor_parallel_size=2, max_model_len=64, bind_cores=bind))
    try:
        shares = [os.sched_getaffinity(pid) for pid in client.pids.values()]
        assert len(shares) == 2
        if bind:
            assert shares[0].isdisjoint(shares[1])
            assert client.info["cpu_threads"] == len(allowed) // 2
        else:
            assert shares == [allowed, allowed]
    finally:
        client.close()
    assert os.sched_getaffinity(0) == allowed
