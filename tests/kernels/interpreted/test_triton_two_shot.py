"""The kernels of the two-shot all-reduce: all ranks in this process, one kernel of all of them after the other."""

from __future__ import annotations

import pytest
import torch

from yalis.kernels import torch_reference as reference
from yalis.kernels import triton_two_shot as kernels

DTYPES = [torch.float32, torch.float16]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def exchanges(ranks: int, unit: int, units: int, count: int, dtype: torch.dtype) -> list[kernels.Exchange]:
    """With a bit more memory than is needed in each half, which nobody may touch (`untouched`)."""
    room = -(-units // ranks) * unit
    memory = [torch.full((2 * ((ranks - 1) * room + 64),), torch.nan, dtype=dtype) for _ in range(ranks)]
    bases = torch.tensor([staged.data_ptr() for staged in memory])
    return [kernels.Exchange(rank, ranks, bases, memory[rank], unit, units, count) for rank in range(ranks)]


def untouched(exchange: kernels.Exchange) -> bool:
    return all(bool(half[-64:].isnan().all()) for half in exchange.staged.chunk(2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranks", [2, 8])
@pytest.mark.parametrize("count", [1, 17, 160, 20000])
def test_sum(dtype: torch.dtype, ranks: int, count: int) -> None:
    xs = [torch.randn(count).to(dtype) for _ in range(ranks)]
    total = torch.zeros(count)
    for x in xs:
        total += x.float()
    made = exchanges(ranks, 16, -(-count // 16), count, dtype)
    outs = [x if rank % 2 else torch.full_like(x, torch.nan) for rank, x in enumerate(xs)]
    for x, exchange in zip(xs, made, strict=True):
        kernels.scatter(x, exchange)
    for x, out, exchange in zip(xs, outs, made, strict=True):
        kernels.reduce(x, out, exchange)
    for out, exchange in zip(outs, made, strict=True):
        kernels.finish(out, exchange)
        assert torch.equal(out, total.to(dtype))
        assert untouched(exchange)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize(("rows", "hidden"), [(1, 64), (2, 48), (7, 4096), (5, 16)])
def test_sum_residual_and_norm(dtype: torch.dtype, ranks: int, rows: int, hidden: int) -> None:
    xs = [torch.randn(rows, hidden).to(dtype) for _ in range(ranks)]
    residual, weight = torch.randn(rows, hidden).to(dtype), torch.randn(hidden).to(dtype)
    total = torch.zeros(rows, hidden)
    for x in xs:
        total += x.float()
    wanted = (total.to(dtype).float() + residual.float()).to(dtype)
    normed = reference.rms_norm(wanted, weight, 1e-5)
    made = exchanges(ranks, hidden, rows, rows * hidden, dtype)
    held = [residual.clone() for _ in xs]
    for x, exchange in zip(xs, made, strict=True):
        kernels.scatter(x, exchange)
    for x, mine, exchange in zip(xs, held, made, strict=True):
        kernels.reduce_norm(x, mine, weight, 1e-5, exchange)
    for x, mine, exchange in zip(xs, held, made, strict=True):
        kernels.finish_norm(x, mine, weight, 1e-5, exchange)
        assert torch.equal(mine, wanted)
        tolerance = {torch.float32: 2e-6, torch.float16: 1e-3}[dtype]
        torch.testing.assert_close(x, normed, rtol=tolerance, atol=tolerance)
        assert torch.equal(x, xs[0]), "the same bits on every rank"
        assert untouched(exchange)


def test_a_rank_behind_still_reads_what_the_call_before_left() -> None:
    """A short call, then the scatter of a long one by its peer, before this rank has finished the short one."""
    short, long = [torch.randn(32) for _ in range(2)], torch.randn(4096)
    wanted = short[0] + short[1]
    memory = [torch.full((8192,), torch.nan) for _ in range(2)]
    bases = torch.tensor([staged.data_ptr() for staged in memory])
    first = [kernels.Exchange(rank, 2, bases, memory[rank], 16, 2, 32) for rank in range(2)]
    second = kernels.Exchange(1, 2, bases, memory[1], 16, 256, 4096)
    for x, exchange in zip(short, first, strict=True):
        kernels.scatter(x, exchange)
    for x, exchange in zip(short, first, strict=True):
        kernels.reduce(x, x, exchange)
    kernels.finish(short[1], first[1])
    kernels.scatter(long, second)
    kernels.finish(short[0], first[0])
    assert torch.equal(short[0], wanted)
