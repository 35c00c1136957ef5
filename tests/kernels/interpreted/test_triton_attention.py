"""The attention backend `triton` against plain softmax attention: ragged batches, dirty and scrambled pages.

The interpreter multiplies bf16 matrices as integers, so bf16 is left to tests/gpu.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from yalis.attention.base import AttentionBatch, AttentionSpec, LayerKV, Rotation
from yalis.attention.registry import create_backend
from yalis.attention.triton import TritonBackend
from yalis.kernels import torch_reference, triton_attention
from yalis.kernels.triton_attention import DecodeShape, PrefillShape

CPU = torch.device("cpu")
SMALL_TILES = (DecodeShape(keys=16, stages=1, warps=1), PrefillShape(rows=32, keys=16, stages=1, warps=1))


def run(
    lengths: list[tuple[int, int]], *, heads: int, kv_heads: int, dim: int, block_size: int, dtype: torch.dtype,
    window: int | None, splits: int | None = None, twice: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """lengths: (query tokens, all tokens) per sequence. Returns (got, want)."""
    torch.manual_seed(0)
    what = AttentionSpec(heads, kv_heads, dim, 0.3, block_size, dtype, CPU)
    per_sequence = max(-(-total // block_size) for _, total in lengths)
    order = torch.randperm(len(lengths) * per_sequence)
    table = order.view(len(lengths), per_sequence).to(torch.int32)
    shape = (len(order), kv_heads, block_size, dim)
    kv = LayerKV(torch.full(shape, torch.nan, dtype=dtype), torch.full(shape, torch.nan, dtype=dtype))
    slots = []
    for row, (new, total) in zip(table, lengths, strict=True):
        where = torch.tensor([int(row[p // block_size]) * block_size + p % block_size for p in range(total)])
        k, v = torch.randn(2, total, kv_heads, dim).to(dtype)
        torch_reference.write_kv(k, v, kv.k, kv.v, where)
        slots.append(where[total - new :])
    news = [new for new, _ in lengths]
    batch = AttentionBatch(
        query_start=torch.tensor([0, *news]).cumsum(0).to(torch.int32),
        seq_lens=torch.tensor([total for _, total in lengths], dtype=torch.int32),
        block_table=table,
        slot_mapping=torch.cat(slots),
        query_lens_host=news,
        seq_lens_host=[total for _, total in lengths],
    )
    fused = torch.randn(sum(news), heads + 2 * kv_heads, dim).to(dtype)
    q = fused[:, :heads]
    backend = create_backend("triton", what)
    assert isinstance(backend, TritonBackend)
    backend._decode, backend._prefill = dict.fromkeys((False, True), SMALL_TILES[0]), SMALL_TILES[1]
    if PrefillShape.of(dtype, dim, heads // kv_heads).rows > SMALL_TILES[1].rows * 8:
        backend._prefill = replace(SMALL_TILES[1], rows=PrefillShape.of(dtype, dim, heads // kv_heads).rows)
    plan = backend.plan(batch)
    if splits is not None:
        plan = replace(plan, splits=splits, scratch=backend._scratch_for(plan.num_decodes, splits))
    got = backend.forward(q, kv, plan, window)
    if twice:  # the arrival counters were left at zero
        assert torch.equal(backend.forward(q, kv, plan, window), got)
    want = torch.full_like(got, torch.nan)
    torch_reference.paged_attention(
        q, kv.k, kv.v, batch.query_start, batch.seq_lens, table, what.scale, window, want
    )  # fmt: skip
    return got, want


def check(got: torch.Tensor, want: torch.Tensor) -> None:
    tolerance = {torch.float32: 2e-5, torch.float16: 2e-3}[got.dtype]
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


MIXED = [(3, 12), (1, 5), (9, 9), (1, 40), (17, 50), (1, 1)]


@pytest.mark.parametrize("window", [None, 1, 5, 100])
def test_mixed_batch(window: int | None) -> None:
    check(*run(MIXED, heads=6, kv_heads=2, dim=16, block_size=4, dtype=torch.float32, window=window))


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("splits", [1, 2, 3, 7])
def test_splits_and_their_merge(splits: int, window: int | None) -> None:
    lengths = [(1, 1), (1, 16), (1, 17), (1, 70), (1, 33)]
    sizes = dict(heads=4, kv_heads=1, dim=32, block_size=8, dtype=torch.float32)
    check(*run(lengths, **sizes, window=window, splits=splits, twice=True))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "dtype"),
    [
        (4, 4, 96, torch.float16),
        (7, 1, 64, torch.float16),
        (8, 2, 128, torch.float16),
        (2, 1, 256, torch.float32),
        (20, 1, 32, torch.float32),
    ],
)
def test_heads_and_dtypes(heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    lengths = [(5, 20), (1, 37), (12, 12)]
    check(*run(lengths, heads=heads, kv_heads=kv_heads, dim=dim, block_size=16, dtype=dtype, window=None))


def test_whole_tiles_without_mask() -> None:
    """A chunk far behind its prefix: most tiles are seen by every query."""
    check(*run([(20, 100), (1, 64)], heads=4, kv_heads=2, dim=16, block_size=16, dtype=torch.float32, window=None))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "norm", "window"),
    [(4, 2, 16, False, None), (7, 1, 48, True, None), (3, 3, 64, True, 9)],
)
def test_decode_that_rotates_and_writes(heads: int, kv_heads: int, dim: int, norm: bool, window: int | None) -> None:
    """One kernel gives what rope, KV write and attention give; rows of padding write nothing."""
    torch.manual_seed(0)
    block_size, lengths = 4, [1, 17, 40, 1]
    table = torch.randperm(4 * 10).view(4, 10).to(torch.int32)
    slots = torch.tensor([int(table[b, (n - 1) // 4]) * 4 + (n - 1) % 4 for b, n in enumerate(lengths)])
    slots[3] = -1
    batch = AttentionBatch(
        torch.arange(5, dtype=torch.int32), torch.tensor(lengths, dtype=torch.int32), table, slots, [1] * 4, [40] * 4
    )  # fmt: skip
    fused = torch.randn(4, heads + 2 * kv_heads, dim)
    pages = torch.randn(2, 40, kv_heads, block_size, dim)
    norms = (torch.randn(dim), torch.randn(dim), 1e-6) if norm else None
    rotation = Rotation(torch.tensor(lengths) - 1, torch.randn(64, dim), norms)
    results = []
    for fuse in (False, True):
        backend = TritonBackend(AttentionSpec(heads, kv_heads, dim, 0.3, block_size, torch.float32, CPU))
        plan = replace(
            backend.plan(batch), splits=3, shape=SMALL_TILES[0], fuse=fuse, scratch=backend._scratch_for(4, 3)
        )
        kv = LayerKV(*pages.clone().unbind())
        q, k, v = fused.clone().split([heads, kv_heads, kv_heads], 1)
        results.append((backend.rotate_and_forward(q, k, v, rotation, kv, plan, window), kv.k, kv.v))
    for apart, whole in zip(*results, strict=True):
        torch.testing.assert_close(whole, apart, atol=2e-5, rtol=2e-5)
    assert not torch.equal(results[1][1], pages[0])


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("lengths", [MIXED, [(11, 11)], [(1, 30)], []], ids=str)
def test_padded_steps_attend_to_what_is_there(lengths: list[tuple[int, int]], window: int | None) -> None:
    """One plan for several steps: prompts and decodes as they come, and nothing is touched where there is none."""
    torch.manual_seed(0)
    tokens, decodes, prompts, block_size, longest = 40, 4, 3, 4, 52
    heads, kv_heads, dim = 4, 2, 16
    backend = TritonBackend(AttentionSpec(heads, kv_heads, dim, 0.3, block_size, torch.float32, CPU))
    backend._decode, backend._prefill = dict.fromkeys((False, True), SMALL_TILES[0]), SMALL_TILES[1]
    count = decodes + prompts
    table = torch.randperm(count * 13).view(count, 13).to(torch.int32)
    static = AttentionBatch(
        query_start=torch.zeros(count + 1, dtype=torch.int32),
        seq_lens=torch.ones(count, dtype=torch.int32),
        block_table=table,
        slot_mapping=torch.full((tokens,), -1),
        query_lens_host=[tokens] * prompts + [1] * decodes,
        seq_lens_host=[longest] * count,
    )
    plan = backend.plan_padded(static, decodes)
    kv = LayerKV(*torch.randn(2, count * 13, kv_heads, block_size, dim).unbind())
    q = torch.randn(tokens, heads, dim)
    for there in (MIXED, lengths):  # the second step finds what the first has left
        news, totals = [new for new, _ in there], [total for _, total in there]
        starts = torch.tensor([0, *news, *[0] * (count - len(there))]).cumsum(0)
        static.query_start.copy_(starts)
        static.seq_lens.copy_(torch.tensor([*totals, *[1] * (count - len(there))]))
        backend.renew_padded(plan, news, totals)
        got = backend.forward(q, kv, plan, window)
    rows = sum(news)
    marked = torch.full_like(q, 7.0)
    where = (static.query_start, static.seq_lens, table, 0.3)
    assert plan.work is not None and plan.scratch is not None
    triton_attention.prefill(
        q, kv.k, kv.v, marked, plan.work, *where, window=window, shape=SMALL_TILES[1], pdl=False
    )  # fmt: skip
    triton_attention.decode(
        q, kv.k, kv.v, marked, plan.scratch, plan.decodes, *where,
        splits=plan.splits, window=window, shape=plan.shape, pdl=False,
    )  # fmt: skip
    assert torch.equal(marked[:rows], got[:rows]) and (marked[rows:] == 7.0).all()
    want = torch.zeros(rows, heads, dim)
    if there:
        lengths_there = (starts[: len(there) + 1].to(torch.int32), static.seq_lens[: len(there)], table[: len(there)])
        torch_reference.paged_attention(q[:rows], kv.k, kv.v, *lengths_there, 0.3, window, want)
    check(got[:rows], want)
    listed = plan.listed
    assert listed is not None and (listed >= 0).sum() == sum(new == 1 for new in news) + 2 * sum(
        -(-new // backend._prefill.queries(2)) for new in news if new > 1
    )
