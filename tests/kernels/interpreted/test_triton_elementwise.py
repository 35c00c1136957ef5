"""The small kernels against `yalis.kernels.torch_reference`, with the same roundings.

The interpreter cuts bf16 off where a GPU rounds it, so bf16 is left to tests/gpu.
"""

from __future__ import annotations

import pytest
import torch

from yalis.kernels import torch_reference as reference
from yalis.kernels import triton_elementwise as kernels

DTYPES = [torch.float32, torch.float16]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    # One unit in the last place where a transcendental function differs from torch's.
    tolerance = {torch.float32: 2e-6, torch.float16: 1e-3}[got.dtype]
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), [(1, 64), (3, 4096), (2, 1536), (5, 7)])
def test_norms(dtype: torch.dtype, rows: int, size: int) -> None:
    x, residual = torch.randn(2, rows, size).to(dtype).unbind()
    weight = torch.randn(size).to(dtype)
    out = torch.full_like(x, torch.nan)
    kernels.rms_norm(x, None, weight, 1e-5, out, pdl=False)
    close(out, reference.rms_norm(x, weight, 1e-5))

    total = residual + x
    want = reference.rms_norm(total, weight, 1e-5)
    kernels.rms_norm(x, residual, weight, 1e-5, x, pdl=False)  # in place, as the decoder calls it
    close(x, want)
    assert torch.equal(residual, total)


def test_norm_of_heads_in_a_strided_view() -> None:
    fused = torch.randn(3, 7, 48)
    heads, weight = fused[:, 2:5], torch.randn(48)
    out = torch.full((3, 3, 48), torch.nan)
    kernels.rms_norm(heads, None, weight, 1e-6, out, pdl=False)
    close(out, reference.rms_norm(heads, weight, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), [(1, 1024), (3, 1500), (2, 5)])
def test_silu_and_mul(dtype: torch.dtype, rows: int, size: int) -> None:
    gate_up = (torch.randn(rows, 2 * size) * 4).to(dtype)
    out = torch.full((rows, size), torch.nan, dtype=dtype)
    kernels.silu_and_mul(gate_up, out, pdl=False)
    close(out, reference.silu_and_mul(gate_up))


def test_embedding_gives_zeros_for_ids_outside() -> None:
    table = torch.randn(11, 1300)
    ids = torch.tensor([10, -1, 0, 11, 5, -(2**40)])
    out = torch.full((6, 1300), torch.nan)
    kernels.embedding(ids, table, out, pdl=False)
    assert torch.equal(out, reference.embedding(ids, table))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "block_size"), [(8, 2, 64, 16), (7, 1, 96, 4), (3, 3, 10, 5)])
def test_rope_and_kv(dtype: torch.dtype, norm: bool, heads: int, kv_heads: int, dim: int, block_size: int) -> None:
    rows, blocks = 5, 6
    fused = torch.randn(rows, heads + 2 * kv_heads, dim).to(dtype)
    q, k, v = fused.split([heads, kv_heads, kv_heads], 1)
    table = torch.randn(40, dim)
    positions = torch.tensor([3, 39, 0, 17, 5])
    slots = torch.randperm(blocks * block_size)[:rows]
    slots[3] = -1
    norms = (torch.randn(dim).to(dtype), torch.randn(dim).to(dtype), 1e-6) if norm else None

    want_q, want_k = q.clone(), k.clone()
    if norms is not None:
        want_q = reference.rms_norm(want_q, norms[0], norms[2])
        want_k = reference.rms_norm(want_k, norms[1], norms[2])
    reference.rope_(want_q, positions, table)
    reference.rope_(want_k, positions, table)
    caches = [torch.full((blocks, kv_heads, block_size, dim), -7.0).to(dtype) for _ in range(4)]
    reference.write_kv(want_k, v, caches[0], caches[1], slots)
    kernels.rope_and_write_kv(q, k, v, positions, table, (caches[2], caches[3], slots), norms, pdl=False)
    close(q, want_q)
    close(caches[2], caches[0])
    assert torch.equal(caches[3], caches[1])


def test_rope_alone_and_write_alone() -> None:
    q, k, v = torch.randn(3, 4, 32), torch.randn(3, 2, 32), torch.randn(3, 2, 32)
    table, positions, slots = torch.randn(9, 32), torch.tensor([8, 0, 4]), torch.tensor([2, -1, 7])
    want_q, want_k = q.clone(), k.clone()
    reference.rope_(want_q, positions, table)
    reference.rope_(want_k, positions, table)
    kernels.rope_and_write_kv(q, k, k, positions, table, None, None, pdl=False)
    close(q, want_q)
    close(k, want_k)
    caches = [torch.zeros(2, 2, 4, 32) for _ in range(4)]
    reference.write_kv(k, v, caches[0], caches[1], slots)
    kernels.rope_and_write_kv(k, k, v, None, None, (caches[2], caches[3], slots), None, pdl=False)
    assert torch.equal(caches[2], caches[0])
    assert torch.equal(caches[3], caches[1])
