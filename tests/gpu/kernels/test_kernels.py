"""The Triton kernels on a GPU against torch in the same or higher precision, graphs and dependent launch included."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from yalis.attention.base import AttentionBatch, AttentionSpec, LayerKV, Rotation
from yalis.attention.registry import create_backend
from yalis.attention.triton import TritonBackend, TritonPlan
from yalis.kernels import ops, torch_reference
from yalis.kernels.gpu import gpu_kernels

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device; run this on a machine with one")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = [BF16, FP16, FP32]
# Largest relative error (Frobenius) against fp32 or fp64.
LIMIT = {BF16: 8e-3, FP16: 1e-3, FP32: 2e-6}


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.device("cuda"):
        yield


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    assert got.isfinite().all()
    return float((got.double() - want.double()).norm() / want.double().norm())


def captured(run: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What ``run`` gives as a replayed graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin()
        out = run()
        graph.capture_end()
    graph.replay()
    torch.cuda.synchronize()
    return out


def test_triton_serves_here() -> None:
    assert gpu_kernels().triton, gpu_kernels().reason


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), [(1, 4096), (8, 4096), (33, 1536), (2, 8192), (3, 100)])
def test_norms(dtype: torch.dtype, rows: int, size: int) -> None:
    x, residual, weight = torch.randn(rows, size).to(dtype), torch.randn(rows, size).to(dtype), torch.randn(size)
    weight = weight.to(dtype)
    want = torch_reference.rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(ops.rms_norm(x, weight, 1e-5), want, rtol=8e-3, atol=1e-5)
    total = residual + x
    normed, held = ops.add_rms_norm(x, residual, weight, 1e-5, out=x)
    assert torch.equal(held, total)
    assert error(normed, torch_reference.rms_norm(total, weight, 1e-5)) < LIMIT[dtype] / 4


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_and_mul_and_embedding(dtype: torch.dtype) -> None:
    gate_up = (torch.randn(9, 2 * 14336) * 3).to(dtype)
    assert error(ops.silu_and_mul(gate_up), torch_reference.silu_and_mul(gate_up)) < LIMIT[dtype] / 4
    table, ids = torch.randn(1000, 4096).to(dtype), torch.tensor([5, -1, 999, 1000, 0, 2**40])
    assert torch.equal(ops.embedding(ids, table), torch_reference.embedding(ids, table))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(32, 8, 128), (14, 2, 64), (6, 2, 96), (8, 1, 256)])
def test_rope_and_write_kv(dtype: torch.dtype, norm: bool, heads: int, kv_heads: int, dim: int) -> None:
    rows, blocks, block_size = 37, 9, 16
    fused = torch.randn(rows, heads + 2 * kv_heads, dim).to(dtype)
    q, k, v = fused.split([heads, kv_heads, kv_heads], 1)
    table = torch.randn(500, dim)
    positions, slots = torch.randint(0, 500, (rows,)), torch.randperm(blocks * block_size)[:rows]
    slots[3] = -1
    norms = (torch.randn(dim).to(dtype), torch.randn(dim).to(dtype), 1e-6) if norm else None
    want_q, want_k = q.clone(), k.clone()
    if norms is not None:
        want_q = torch_reference.rms_norm(want_q, norms[0], norms[2])
        want_k = torch_reference.rms_norm(want_k, norms[1], norms[2])
    torch_reference.rope_(want_q, positions, table)
    torch_reference.rope_(want_k, positions, table)
    caches = [torch.zeros(blocks, kv_heads, block_size, dim).to(dtype) for _ in range(4)]
    torch_reference.write_kv(want_k, v, caches[0], caches[1], slots)
    got = ops.rope_and_write_kv(q, k, v, positions, table, caches[2], caches[3], slots, norms=norms)
    assert error(got, want_q) < LIMIT[dtype] / 4
    assert error(caches[2], caches[0]) < LIMIT[dtype] / 4
    assert torch.equal(caches[3], caches[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(32, 8, 128), (14, 2, 64), (6, 6, 96), (8, 1, 256)])
def test_attention(dtype: torch.dtype, window: int | None, heads: int, kv_heads: int, dim: int) -> None:
    lengths = [(1, 1), (130, 130), (1, 640), (40, 700), (1, 1999), (3, 17), (300, 900), (1, 64)]
    check_attention(lengths, dtype, window, heads, kv_heads, dim)


@pytest.mark.parametrize("batch", [1, 8, 32])
def test_decode_attention_in_a_graph(batch: int) -> None:
    check_attention([(1, 1 + 97 * i % 1500) for i in range(7, 7 + batch)], BF16, None, 32, 8, 128, graph=True)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(32, 8, 128), (14, 2, 64), (6, 2, 96)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_that_rotates_and_writes(dtype: torch.dtype, heads: int, kv_heads: int, dim: int, norm: bool) -> None:
    lengths = [1, 640, 65, 64, 1500, 33, 1, 129]
    count, block_size = len(lengths), 16
    table = torch.randperm(count * 100).view(count, 100).to(torch.int32)
    slots = torch.stack([table[b, (n - 1) // 16].long() * 16 + (n - 1) % 16 for b, n in enumerate(lengths)])
    slots[6] = -1
    batch = AttentionBatch(
        torch.arange(count + 1, dtype=torch.int32), torch.tensor(lengths, dtype=torch.int32), table, slots,
        [1] * count, [1600] * count,
    )  # fmt: skip
    device = torch.device("cuda", torch.cuda.current_device())
    spec = AttentionSpec(heads, kv_heads, dim, dim**-0.5, block_size, dtype, device)
    pages = torch.randn(2, count * 100, kv_heads, block_size, dim).to(dtype)
    fused = torch.randn(count, heads + 2 * kv_heads, dim).to(dtype)
    norms = (torch.randn(dim).to(dtype), torch.randn(dim).to(dtype), 1e-6) if norm else None
    rotation = Rotation(torch.tensor(lengths) - 1, torch.rand(1600, dim) * 2 - 1, norms)
    results = []
    for fuse in (False, True):
        backend = TritonBackend(spec)
        plan = replace(backend.plan(batch), fuse=fuse)
        kv = LayerKV(*pages.clone().unbind())

        def run(backend: TritonBackend = backend, kv: LayerKV = kv, plan: TritonPlan = plan) -> torch.Tensor:
            q, k, v = fused.clone().split([heads, kv_heads, kv_heads], 1)
            return backend.rotate_and_forward(q, k, v, rotation, kv, plan, None)

        results.append((captured(run), kv.k, kv.v))
    for apart, whole in zip(*results, strict=True):
        assert error(whole, apart) < LIMIT[dtype] / 2
    assert not torch.equal(results[1][1], pages[0])


def check_attention(
    lengths: list[tuple[int, int]], dtype: torch.dtype, window: int | None, heads: int, kv_heads: int, dim: int,
    *, graph: bool = False,
) -> None:  # fmt: skip
    block_size = 16
    device = torch.device("cuda", torch.cuda.current_device())
    spec = AttentionSpec(heads, kv_heads, dim, dim**-0.5, block_size, dtype, device)
    per_sequence = max(-(-total // block_size) for _, total in lengths)
    table = torch.randperm(len(lengths) * per_sequence).view(len(lengths), per_sequence).to(torch.int32)
    shape = (table.numel(), kv_heads, block_size, dim)
    k_pages, v_pages = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    news, totals = [new for new, _ in lengths], [total for _, total in lengths]
    query_start = torch.tensor([0, *news]).cumsum(0).to(torch.int32)
    seq_lens = torch.tensor(totals, dtype=torch.int32)
    for row, total in zip(table, totals, strict=True):  # what lies past the end must not be looked at
        page, offset = divmod(total, block_size)
        if offset:
            k_pages[row[page], :, offset:] = v_pages[row[page], :, offset:] = torch.nan
    host_totals = [per_sequence * block_size] * len(totals) if graph else totals
    batch = AttentionBatch(
        query_start, seq_lens, table, torch.zeros(sum(news), dtype=torch.int64), news, host_totals
    )  # fmt: skip
    fused = torch.randn(sum(news), heads + 2 * kv_heads, dim).to(dtype)
    q = fused[:, :heads]
    backend = create_backend("triton", spec)
    kv = LayerKV(k_pages, v_pages)

    def run() -> torch.Tensor:
        return backend.forward(q, kv, backend.plan(batch), window)

    got = captured(run) if graph else run()
    assert torch.equal(run(), got)  # whoever merges, and whatever ran before
    want = torch.full(q.shape, torch.nan)
    torch_reference.paged_attention(
        q, k_pages, v_pages, query_start, seq_lens, table, spec.scale, window, want
    )  # fmt: skip
    assert error(got, want) < LIMIT[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 5, 8, 20, 64])
@pytest.mark.parametrize(("n", "k"), [(512, 1024), (1000, 520), (6144, 4096)])
def test_products_of_few_rows(dtype: torch.dtype, bias: bool, rows: int, n: int, k: int) -> None:
    from yalis.kernels import gemm

    x, weight = torch.randn(rows, k).to(dtype), torch.randn(2 * n, k).to(dtype) * k**-0.5
    b = torch.randn(2 * n).to(dtype) if bias else None
    whole = F.linear(x.double(), weight.double(), None if b is None else b.double())
    limit = LIMIT[dtype] if dtype == FP32 else LIMIT[dtype] / 2  # float32 rounds thousands of times, others once
    for shape in gemm.candidates(rows, dtype, gated=True):
        for _ in range(2):
            got = gemm.run(x, weight, b, shape, gated=False)
            assert error(got, whole) < limit, str(shape)
            gate, up = whole.to(dtype).double().chunk(2, -1)
            got = gemm.run(x, weight, b, shape, gated=True)
            assert error(got, F.silu(gate) * up) < LIMIT[dtype] * 1.5, str(shape)


def test_tune_measures_once_and_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from yalis.kernels import gemm

    monkeypatch.setenv("YALIS_CACHE_DIR", str(tmp_path))
    plain, gated = (ops.pack_linear(torch.randn(n, 1024).to(BF16) / 32) for n in (768, 1536))
    first = ops.tune_products([ops.LinearUse(plain, waits=True), ops.LinearUse(gated, gated=True)], [1, 8])
    assert first.products == first.measured == 4
    again = ops.tune_products([ops.LinearUse(plain, waits=True), ops.LinearUse(gated, gated=True)], [1, 8])
    assert again.products == first.products and again.measured == 0
    for rows in (1, 3, 8):
        x = torch.randn(rows, 1024).to(BF16)
        want = F.linear(x.double(), plain.unpack().double())
        assert error(ops.linear(x, plain), want) < LIMIT[BF16] / 2
        gate, up = F.linear(x.double(), gated.unpack().double()).to(BF16).double().chunk(2, -1)
        assert error(ops.linear_silu_and_mul(x, gated), F.silu(gate) * up) < LIMIT[BF16] * 1.5
    gemm._state.cache_clear()
