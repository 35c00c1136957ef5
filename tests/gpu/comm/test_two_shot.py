"""The two-shot all-reduce for long messages between two GPUs: exact sums, equal bits, in graphs, and who comes late."""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Callable

import pytest
import torch

from tests.support.ranks import run_ranks
from yalis.bench.allreduce import crafted
from yalis.comm.algorithms import two_shot
from yalis.comm.communicator import Communicator, init_distributed
from yalis.comm.topology import from_environment
from yalis.errors import PeerLostError

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

BF16 = torch.bfloat16
# The last takes three pieces and a bit, the one before fills a piece.
COUNTS = (1, 17, 8191, 1 << 20, two_shot.BUFFER_BYTES // 2, 3 * two_shot.BUFFER_BYTES // 2 + 4099)
# Rows and hidden size: fewer rows than ranks, odd numbers of them, several pieces.
SHAPES = ((1, 4096), (5, 8192), (777, 4096), (64, 5120), (9001, 4096))


def opened(algorithm: str, timeout_s: float = 30.0) -> Communicator:
    topology = from_environment(os.environ)
    torch.cuda.set_device(topology.rank)
    init_distributed(topology)
    device = f"cuda:{topology.rank}"
    return Communicator.create(topology, (0, 1), device=device, algorithm=algorithm, timeout_s=timeout_s)


def digest(*tensors: torch.Tensor) -> str:
    found = hashlib.sha256()
    for x in tensors:
        found.update(x.cpu().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def total(count: int, dtype: torch.dtype, comm: Communicator) -> torch.Tensor:
    parts = [crafted(rank, 2, count, dtype, comm.device).float() for rank in range(2)]
    return (parts[0] + parts[1]).to(dtype)


def noise(comm: Communicator, *shape: int, rank: int | None = None) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(comm.rank if rank is None else rank)
    return torch.randn(*shape, device=comm.device, generator=generator).to(BF16)


def sums() -> list[str]:
    found = []
    with opened("two_shot") as comm:
        assert comm.algorithms == ("two_shot", "torch") and not comm.uncapturable
        for dtype in (BF16, torch.float16, torch.float32):
            for count in COUNTS:
                for in_place in (False, True):
                    x = crafted(comm.rank, 2, count, dtype, comm.device)
                    out = comm.all_reduce(x, out=x if in_place else None)
                    assert torch.equal(out, total(count, dtype, comm)), (dtype, count, in_place)
        shifted = crafted(comm.rank, 2, 70001, BF16, comm.device)[3:]  # not aligned
        assert torch.equal(comm.all_reduce(shifted), total(70001, BF16, comm)[3:])
        found.append(digest(comm.all_reduce(noise(comm, 1 << 22))))
        assert comm.stats.algorithms["two_shot"][0] == 2 * 3 * len(COUNTS) + 2
    return found


def norms() -> list[str]:
    found = []
    with opened("two_shot") as comm:
        for rows, hidden in SHAPES:
            x, residual = noise(comm, rows, hidden), noise(comm, rows, hidden, rank=7)
            weight = noise(comm, hidden, rank=8)
            wanted = (comm.all_reduce(x).float() + residual.float()).to(BF16)
            wide = wanted.float()
            expected = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(BF16) * weight
            normed, held = comm.all_reduce_rmsnorm(x, residual, weight, 1e-5)
            assert torch.equal(held, wanted), (rows, hidden)
            torch.testing.assert_close(normed, expected, rtol=0.02, atol=0.02)
            found.append(digest(normed, held))
    return found


def graphs() -> list[str]:
    """Replays, with other calls of other sizes in between and a late rank now and then."""
    with opened("two_shot") as comm:
        x, out = noise(comm, 777, 4096), torch.empty(777, 4096, device=comm.device, dtype=BF16)
        small = crafted(comm.rank, 2, 4099, torch.float32, comm.device)
        residual, weight = noise(comm, 777, 4096, rank=7), noise(comm, 4096, rank=8)
        once = comm.all_reduce(x)
        expected = comm.all_reduce_rmsnorm(once.clone(), residual.clone(), weight, 1e-5)
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            with torch.cuda.graph(graph, stream=stream):
                comm.all_reduce(x, out=out)
                normed, held = comm.all_reduce_rmsnorm(out, residual.clone(), weight, 1e-5)
            wrong = torch.zeros((), device=comm.device, dtype=torch.int64)
            for turn in range(100):
                if turn % 10 == comm.rank:
                    time.sleep(2e-3)
                graph.replay()
                wrong += (normed != expected[0]).sum() + (held != expected[1]).sum()
                wrong += (comm.all_reduce(small) != total(4099, torch.float32, comm)).sum()
            stream.synchronize()
        assert int(wrong) == 0
        return [digest(normed, held)]


def handed_on() -> None:
    """NVRAR takes what is short, and what is longer goes on."""
    with opened("nvrar") as comm:
        assert comm.explain(BF16)[-1] == "above: two_shot"
        for count in (1 << 20, (1 << 20) + 8):  # 2 MiB, and more
            x = crafted(comm.rank, 2, count, BF16, comm.device)
            assert torch.equal(comm.all_reduce(x), total(count, BF16, comm))
        assert [comm.stats.algorithms[name][0] for name in ("nvrar", "two_shot")] == [1, 1]


def late() -> None:
    comm = opened("two_shot", timeout_s=3.0)
    x = torch.ones(1 << 20, device=comm.device)
    comm.all_reduce(x)
    torch.cuda.synchronize()
    if comm.rank == 1:
        time.sleep(10)
        os._exit(0)  # without the goodbyes that rank 0 cannot answer any more
    start = time.perf_counter()
    comm.all_reduce(x)
    with pytest.raises(RuntimeError):
        torch.cuda.synchronize()
    took = time.perf_counter() - start
    with pytest.raises(PeerLostError, match="likely"):
        comm.all_reduce(x, out=x)
    comm.close()  # which frees nothing of the device's
    print(f"took {took:.1f}", flush=True)
    sys.stdout.flush()
    os._exit(0 if 3 < took < 8 else 1)


@pytest.mark.parametrize("work", [sums, norms, graphs], ids=lambda work: work.__name__)
def test_two_gpus(work: Callable[[], list[str]]) -> None:
    first, second = run_ranks(work, 2, timeout_s=100, torch_store=True)
    assert first.value == second.value != []


def test_nvrar_hands_long_messages_on() -> None:
    run_ranks(handed_on, 2, timeout_s=100, torch_store=True)


def test_nobody_waits_for_ever() -> None:
    results = run_ranks(late, 2, timeout_s=60, check=False, torch_store=True)
    assert [result.returncode for result in results] == [0, 0], results[0].stderr
