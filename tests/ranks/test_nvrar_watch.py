"""NVRAR under the liveness monitor: the verdict names the lost rank, alike on all survivors."""

from __future__ import annotations

import os
import signal
import time

import pytest

from tests.support.ranks import RankProcesses, rank_store
from yalis.utils.native import cxx_compiler

pytestmark = pytest.mark.skipif(cxx_compiler() is None, reason="no C++ compiler; install g++ or set CXX")
TIMEOUT_S = 3.0


def reduce_until_lost(nodes: int, per_node: int) -> tuple[int | None, str, str, float, float]:
    """All-reduces without end: the rank that the error names, its words, phase, seconds to notice and to close."""
    import torch

    from yalis.comm.communicator import Communicator
    from yalis.comm.liveness import LivenessMonitor
    from yalis.comm.topology import Topology
    from yalis.errors import PeerTimeoutError

    topology, store = Topology(int(os.environ["RANK"]), nodes * per_node, per_node), rank_store()
    monitor = LivenessMonitor.connect(topology, store, timeout_s=TIMEOUT_S)
    comm = Communicator.create(
        topology, range(nodes * per_node), algorithm="nvrar", timeout_s=TIMEOUT_S, store=store, guard=monitor
    )
    x = torch.ones(512)
    calls = 0
    while True:
        start = time.monotonic()
        try:
            comm.all_reduce(x, out=x, tag="L3.mlp.down")
            x.fill_(1)
        except PeerTimeoutError as error:
            noticed = time.monotonic() - start
            monitor.acknowledge()
            start = time.monotonic()
            comm.close()
            closing = time.monotonic() - start
            monitor.close()
            return error.rank, str(error), error.phase, noticed, closing
        calls += 1
        if calls == 50:
            print("ready", flush=True)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_survivors_name_the_same_rank(number: signal.Signals) -> None:
    with RankProcesses(reduce_until_lost, 4, 2, 2, torch_store=True) as group:
        group.wait_for_line("ready")
        group.signal(3, number)
        for rank in (0, 1, 2):
            group.processes[rank].wait(TIMEOUT_S + 15)
        group.processes[3].kill()
        results = group.wait(10)[:3]
    for result in results:
        assert result.returncode == 0, result.stderr
        named, words, phase, noticed, closing = result.value
        assert named == 3
        assert "rank 3" in words and "was lost" in words
        assert phase in ("reduce", "between nodes", "gather")
        assert noticed < TIMEOUT_S + 1.5
        assert closing < 1
