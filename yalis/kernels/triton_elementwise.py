"""The small operations between the matrix products, in Triton: one pass over their data, one launch each.

Roundings are those of `yalis.kernels.torch_reference`: whatever torch rounds to the tensors' dtype is rounded here.

Every kernel takes PDL, a compile-time flag. With it the kernel lets its successor start at once and itself waits for
its predecessor before it touches anything but weights; see `yalis.kernels.gpu`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Columns of one program of the kernels that split rows. A row of 14336 keeps 14 multiprocessors busy.
_PIECE = 1024


@triton.jit
def _begin(PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def _begin_step(PDL: tl.constexpr):
    """As `_begin`, for kernels that may be the first of a step: nothing after them starts before its inputs are there.

    Whatever wrote the step's inputs has ended when these kernels wait no more; only then do they let others start.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def ask_for(pointers):
    """Bring the 128-byte lines at ``pointers`` into the second-level cache."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def ask_for_span(pointers, nbytes):
    """Bring ``nbytes`` at each of ``pointers`` into the second-level cache, both multiples of 16; none if below 1."""
    tl.inline_asm_elementwise(
        "{ .reg .pred some; setp.gt.s32 some, $2, 0; @some cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
        "=r,l,r", [pointers, nbytes], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _rms_norm(
    x, residual, weight, out, x_step, x_inner, residual_step, out_step, out_inner, inner, size, eps,
    ADD: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    outer = (row // inner).to(tl.int64)
    head = row % inner
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    gain = tl.load(weight + columns, mask=inside, other=0).to(tl.float32)
    if ADD:
        _begin(PDL)
    else:
        _begin_step(PDL)
    value = tl.load(x + outer * x_step + head * x_inner + columns, mask=inside, other=0)
    wide = value.to(tl.float32)
    if ADD:
        held = residual + outer * residual_step + columns
        total = (wide + tl.load(held, mask=inside, other=0).to(tl.float32)).to(value.dtype)
        tl.store(held, total, mask=inside)
        wide = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / size + eps)
    normed = (wide * scale).to(value.dtype).to(tl.float32) * gain
    tl.store(out + outer * out_step + head * out_inner + columns, normed.to(value.dtype), mask=inside)


def rms_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, out: torch.Tensor, *, pdl: bool
) -> None:
    """`yalis.kernels.ops.rms_norm`, or with a residual ``add_rms_norm``; ``out`` is given."""
    size = x.shape[-1]
    inner, x_inner, out_inner = (1, 0, 0) if x.dim() == 2 else (x.shape[1], x.stride(1), out.stride(1))
    rows = x.shape[0] * inner
    if rows == 0:
        return
    block = triton.next_power_of_2(size)
    held = x if residual is None else residual
    _rms_norm[(rows,)](
        x, held, weight, out, x.stride(0), x_inner, held.stride(0), out.stride(0), out_inner, inner, size, eps,
        ADD=residual is not None, BLOCK=block, PDL=pdl, num_warps=min(16, max(1, block // 256)), launch_pdl=pdl,
    )  # fmt: skip


@triton.jit
def silu_product(gate, up, DTYPE: tl.constexpr):
    """silu(gate) * up of fp32 values that are representable in DTYPE; rounded after silu, as torch does."""
    return ((gate / (1.0 + tl.exp(-gate))).to(DTYPE).to(tl.float32) * up).to(DTYPE)


@triton.jit
def _silu_and_mul(gate_up, out, step, out_step, size, PIECE: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    inside = columns < size
    _begin(PDL)
    gate = tl.load(gate_up + row * step + columns, mask=inside, other=0)
    up = tl.load(gate_up + row * step + size + columns, mask=inside, other=0)
    found = silu_product(gate.to(tl.float32), up.to(tl.float32), gate.dtype)
    tl.store(out + row * out_step + columns, found, mask=inside)


def silu_and_mul(gate_up: torch.Tensor, out: torch.Tensor, *, pdl: bool) -> None:
    """`yalis.kernels.ops.silu_and_mul`; ``out`` [T, I] is given."""
    rows, size = out.shape
    if rows == 0:
        return
    _silu_and_mul[(rows, triton.cdiv(size, _PIECE))](
        gate_up, out, gate_up.stride(0), out.stride(0), size, PIECE=_PIECE, PDL=pdl, num_warps=4, launch_pdl=pdl
    )


@triton.jit
def _embedding(ids, table, out, count, table_step, out_step, size, PIECE: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    inside = columns < size
    _begin_step(PDL)
    token = tl.load(ids + row)
    readable = tl.where((token >= 0) & (token < count), size, 0)
    found = tl.load(table + token * table_step + columns, mask=columns < readable, other=0)
    tl.store(out + row * out_step + columns, found, mask=inside)


def embedding(ids: torch.Tensor, table: torch.Tensor, out: torch.Tensor, *, pdl: bool) -> None:
    """`yalis.kernels.ops.embedding`; ``out`` [T, K] is given."""
    rows, size = out.shape
    if rows == 0:
        return
    _embedding[(rows, triton.cdiv(size, _PIECE))](
        ids, table, out, table.shape[0], table.stride(0), out.stride(0), size,
        PIECE=_PIECE, PDL=pdl, num_warps=4, launch_pdl=pdl,
    )  # fmt: skip


@triton.jit
def head_norm(a, b, weight, columns, inside, eps, DIM: tl.constexpr, DTYPE: tl.constexpr):
    """RMS norm of heads given as two halves [heads, DIM / 2]."""
    scale = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / DIM + eps)[:, None]
    gain_a = tl.load(weight + columns, mask=inside, other=0).to(tl.float32)[None, :]
    gain_b = tl.load(weight + DIM // 2 + columns, mask=inside, other=0).to(tl.float32)[None, :]
    a = ((a * scale).to(DTYPE).to(tl.float32) * gain_a).to(DTYPE).to(tl.float32)
    b = ((b * scale).to(DTYPE).to(tl.float32) * gain_b).to(DTYPE).to(tl.float32)
    return a, b


@triton.jit
def rotated(a, b, cos, sin, DTYPE: tl.constexpr):
    """Rotary embedding of halves a, b [heads, DIM / 2]; products and sums are rounded one by one."""
    first = (a * cos).to(DTYPE).to(tl.float32) - (b * sin).to(DTYPE).to(tl.float32)
    second = (b * cos).to(DTYPE).to(tl.float32) + (a * sin).to(DTYPE).to(tl.float32)
    return first.to(DTYPE), second.to(DTYPE)


@triton.jit
def _rope_and_write_kv(
    q, k, v, positions, cos_sin, k_cache, v_cache, slots, q_weight, k_weight,
    q_step, q_head, k_step, k_head, v_step, v_head, kv_heads, block_size, eps,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, DIM: tl.constexpr, HALF_PAD: tl.constexpr,
    NORM: tl.constexpr, ROPE: tl.constexpr, WRITE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    HALF: tl.constexpr = DIM // 2
    DTYPE: tl.constexpr = k.dtype.element_ty
    columns = tl.arange(0, HALF_PAD)
    inside = columns < HALF
    one = tl.arange(0, 1)
    pair = inside[None, :] & (one == 0)[:, None]
    # Positions and slots are inputs of the step, and the table is constant: they may be read before the wait.
    if ROPE:
        position = tl.load(positions + token)
        cos = tl.load(cos_sin + position * DIM + columns, mask=inside, other=0)
        sin = tl.load(cos_sin + position * DIM + HALF + columns, mask=inside, other=0)
    if WRITE:
        slot = tl.load(slots + token)
    _begin(PDL)
    keys = k + token * k_step + kv_head * k_head + columns[None, :] + one[:, None]
    values = v + token * v_step + kv_head * v_head + columns[None, :] + one[:, None]
    k_a = tl.load(keys, mask=pair, other=0)
    k_b = tl.load(keys + HALF, mask=pair, other=0)
    if WRITE:
        v_a = tl.load(values, mask=pair, other=0)
        v_b = tl.load(values + HALF, mask=pair, other=0)
    if ROPE:
        cos = cos.to(DTYPE).to(tl.float32)[None, :]
        sin = sin.to(DTYPE).to(tl.float32)[None, :]
        heads = tl.arange(0, GROUP_PAD)
        queries = q + token * q_step + (kv_head * GROUP + heads[:, None]) * q_head + columns[None, :]
        held = inside[None, :] & (heads < GROUP)[:, None]
        a = tl.load(queries, mask=held, other=0).to(tl.float32)
        b = tl.load(queries + HALF, mask=held, other=0).to(tl.float32)
        k_wide_a = k_a.to(tl.float32)
        k_wide_b = k_b.to(tl.float32)
        if NORM:
            a, b = head_norm(a, b, q_weight, columns, inside, eps, DIM, DTYPE)
            k_wide_a, k_wide_b = head_norm(k_wide_a, k_wide_b, k_weight, columns, inside, eps, DIM, DTYPE)
        a, b = rotated(a, b, cos, sin, DTYPE)
        tl.store(queries, a, mask=held)
        tl.store(queries + HALF, b, mask=held)
        k_a, k_b = rotated(k_wide_a, k_wide_b, cos, sin, DTYPE)
    if WRITE:
        if slot >= 0:
            row = ((slot // block_size) * kv_heads + kv_head) * block_size + slot % block_size
            place = row * DIM + columns[None, :] + one[:, None]
            tl.store(k_cache + place, k_a, mask=pair)
            tl.store(k_cache + place + HALF, k_b, mask=pair)
            tl.store(v_cache + place, v_a, mask=pair)
            tl.store(v_cache + place + HALF, v_b, mask=pair)
    else:
        tl.store(keys, k_a, mask=pair)
        tl.store(keys + HALF, k_b, mask=pair)


def rope_and_write_kv(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor | None,
    cos_sin: torch.Tensor | None,
    cache: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
    norms: tuple[torch.Tensor, torch.Tensor, float] | None,
    *,
    pdl: bool,
) -> None:
    """`yalis.kernels.ops.rope_and_write_kv` and its two halves.

    Args:
        q: [T, Hq, D], rotated in place where positions are given.
        k, v: [T, Hk, D]; ``k`` is rotated in place where there is no cache to write to.
        positions, cos_sin: None leaves q and k as they are.
        cache: (k_cache, v_cache, slot_mapping), or None.
        norms: (q weight [D], k weight [D], eps) of norms before the rotation, or None.
    """
    rows, kv_heads, dim = k.shape
    if rows == 0:
        return
    group = q.shape[1] // kv_heads
    k_cache, v_cache, slots = cache if cache is not None else (k, v, k)
    q_weight, k_weight, eps = norms if norms is not None else (k, k, 0.0)
    _rope_and_write_kv[(rows, kv_heads)](
        q, k, v, k if positions is None else positions, k if cos_sin is None else cos_sin, k_cache, v_cache, slots,
        q_weight, k_weight, q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        kv_heads, k_cache.shape[2], eps,
        GROUP=group, GROUP_PAD=triton.next_power_of_2(group), DIM=dim, HALF_PAD=triton.next_power_of_2(dim // 2),
        NORM=norms is not None, ROPE=positions is not None, WRITE=cache is not None, PDL=pdl,
        num_warps=1, launch_pdl=pdl,
        # Contracted to one operation, a product and a sum would lose the rounding between them.
        enable_fp_fusion=False,
    )  # fmt: skip
