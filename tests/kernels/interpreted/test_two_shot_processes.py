"""The two-shot all-reduce between real processes: memory that they share, and Triton's interpreter in each.

Calls of many sizes follow each other, most in several pieces, while ranks dawdle: whoever wrote over what another had
still to read would make a sum wrong.
"""

from __future__ import annotations

import contextlib
import mmap
import multiprocessing
import random
import time
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from yalis.comm.algorithms.two_shot import TwoShot
from yalis.comm.resources import Resources
from yalis.comm.stats import CommStats
from yalis.kernels import torch_reference as reference

BYTES = 16384
CALLS = 16


def made(call: int, rank: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1000 * call + rank))


def work(rank: int, ranks: int, memory: list[mmap.mmap], meet: Any, told: Any) -> None:
    torch.set_num_threads(1)
    # Current devices are a matter of CUDA; processes have one memory.
    mock.patch.object(torch.cuda, "device", contextlib.nullcontext).start()
    views = [torch.frombuffer(piece, dtype=torch.uint8) for piece in memory]
    bases = torch.tensor([view.data_ptr() for view in views])
    shared: Any = SimpleNamespace(buffer=views[rank], bases=bases, meet=lambda: meet.wait(30))
    group: Any = SimpleNamespace(index=rank, size=ranks, device=torch.device("cpu"))
    two_shot = TwoShot(group, Resources(memory=shared), CommStats())
    sizes, dice = random.Random(7), random.Random(rank)
    wrong = []
    for call in range(CALLS):
        if dice.random() < 0.3:
            time.sleep(dice.random() * 0.02)
        if sizes.random() < 0.5:
            count = sizes.choice((1, 100, 4096, 5000))
            total = sum((made(call, other, count) for other in range(1, ranks)), made(call, 0, count))
            x = made(call, rank, count)
            two_shot.all_reduce(x, x)
            good = torch.equal(x, total)
        else:
            rows, hidden = sizes.choice(((1, 512), (7, 256), (33, 128)))
            total = sum((made(call, other, rows, hidden) for other in range(1, ranks)), made(call, 0, rows, hidden))
            residual, weight = made(call, 98, rows, hidden), made(call, 99, hidden)
            wanted = residual + total
            x = made(call, rank, rows, hidden)
            two_shot.all_reduce_rmsnorm(x, residual, weight, 1e-5)
            normed = reference.rms_norm(wanted, weight, 1e-5)
            good = torch.equal(residual, wanted) and torch.allclose(x, normed, rtol=1e-5, atol=1e-5)
        if not good:
            wrong.append(call)
    told.put((rank, wrong))


@pytest.mark.parametrize("ranks", [2, 3])
def test_calls_of_many_sizes(ranks: int) -> None:
    context = multiprocessing.get_context("fork")
    memory = [mmap.mmap(-1, BYTES) for _ in range(ranks)]
    meet, told = context.Barrier(ranks), context.Queue()
    processes = [context.Process(target=work, args=(rank, ranks, memory, meet, told)) for rank in range(ranks)]
    for process in processes:
        process.start()
    try:
        found = dict(told.get(timeout=60) for _ in processes)
    finally:
        for process in processes:
            process.join(5)
            process.kill()
    assert found == {rank: [] for rank in range(ranks)}
